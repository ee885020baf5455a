"""The site's end of Celery: it sends names and ids, and never imports the worker."""

from __future__ import annotations

import logging
from uuid import UUID

from celery import Celery
from django.conf import settings
from kombu.exceptions import OperationalError

RUN_JOB = "worker.run_job"

log = logging.getLogger(__name__)

TRANSPORT = {"socket_timeout": 5, "socket_connect_timeout": 2, "visibility_timeout": 86_400}

app = Celery("fewshot-site", broker=settings.CELERY_BROKER_URL, set_as_current=False)
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    broker_transport_options=TRANSPORT,
    broker_connection_timeout=2,
)


def send(job_id: UUID | str, queue: str) -> bool:
    """Wake a worker of the queue for the job. A lost message loses nothing: the reaper sends it again."""
    try:
        app.send_task(RUN_JOB, args=[str(job_id)], queue=queue, retry=False)
    except (OperationalError, OSError) as error:
        log.warning("job %s could not be sent to %s (%s); the reaper will", job_id, queue, error)
        return False
    return True
