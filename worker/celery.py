"""A worker process: one queue, one child, JSON only. `celery -A worker.celery worker -Q interactive --concurrency 1`.

The message carries a job's id and nothing else; whoever claims the job's row works on it (see webapp/jobs/services.py).
So messages are acknowledged early, and may be lost or come twice.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "webapp.settings")

import django

django.setup()

from celery import Celery, bootsteps, signals
from django.conf import settings

from webapp.health import BEAT_EVERY_S, BEAT_KEY, BEAT_LASTS_S, redis_client
from webapp.queue import TRANSPORT
from worker import janitor, leases

QUEUE = os.environ.get("WORKER_QUEUE", "interactive")
NICENESS = {"interactive": 0, "ingest": 5, "training": 10}  # an answer comes before an import, that before a training

app = Celery("fewshot-worker", broker=settings.CELERY_BROKER_URL, include=["worker.tasks"])
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_max_tasks_per_child=1 if QUEUE == "training" else None,
    worker_proc_alive_timeout=120,  # of a child that starts: where it is not there in 4 s, the next is not either
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options=TRANSPORT,
)


class Beat(bootsteps.StartStopStep):
    """Says in Redis that this queue's consumer is alive, from the consumer's own loop."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        self.say()
        self.timer = consumer.timer.call_repeatedly(BEAT_EVERY_S, self.say)

    def stop(self, consumer: Any) -> None:
        if timer := getattr(self, "timer", None):
            timer.cancel()

    def say(self) -> None:
        try:
            with redis_client() as redis:
                redis.set(BEAT_KEY.format(queue=QUEUE), os.getpid(), ex=BEAT_LASTS_S)
        except OSError:
            pass  # Celery itself notices that Redis is away, and says so


app.steps["consumer"].add(Beat)


@signals.worker_init.connect
def _begin(**_kwargs: Any) -> None:
    os.nice(NICENESS.get(QUEUE, 0))


@signals.worker_ready.connect
def _watch(**_kwargs: Any) -> None:
    leases.start_reaper(QUEUE)
    if QUEUE == "ingest":
        janitor.start()


@signals.worker_shutting_down.connect
def _leave(**_kwargs: Any) -> None:
    leases.ask_to_leave()


@signals.worker_process_init.connect
def _warm(**_kwargs: Any) -> None:
    """The first answer shall not wait for the encoder to load."""
    if QUEUE != "training":
        from worker.runtime import warm_up

        warm_up()
