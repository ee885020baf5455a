"""The one task: claim the job that the message names, do it, say how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable

from django.utils.translation import gettext as _

from fewshot_engine.errors import EngineError
from webapp.jobs.models import Job
from webapp.jobs.services import LeaseLost, finish
from webapp.queue import RUN_JOB
from worker.celery import app
from worker.leases import Lease, claimed

log = logging.getLogger(__name__)


@app.task(name=RUN_JOB)
def run_job(job_id: str) -> None:
    """Do a job if it is there to be done; a message that comes twice, or too late, does nothing."""
    with claimed(job_id) as lease:
        if lease is None:
            return
        try:
            _handler(Job.objects.values_list("kind", flat=True).get(pk=job_id))(lease)
        except LeaseLost:
            log.warning("job %s is somebody else's now", job_id)
        except EngineError as error:
            _fail(lease, str(error))
        except MemoryError:
            log.exception("job %s ran out of memory", job_id)
            _fail(lease, _("The memory did not suffice. Smaller photos, or a smaller image size, need less."))
        except OSError as error:
            log.exception("job %s", job_id)
            _fail(lease, _("The disk or the network failed: %(why)s.") % {"why": error.strerror or error})
        except Exception as error:  # the outermost layer: a person reads the sentence, the log has the rest
            log.exception("job %s", job_id)
            _fail(
                lease,
                _("Something unforeseen went wrong (%(name)s); the log says more.") % {"name": type(error).__name__},
            )


def _handler(kind: str) -> Callable[[Lease], None]:
    """What does a kind of job; imported late, so that only the training worker loads torch."""
    if kind == Job.Kind.TRAIN:
        from worker.runs import train

        return train
    from worker import answers, intake

    return {
        Job.Kind.INGEST: intake.run,
        Job.Kind.PROTOTYPES: answers.learn_labels,
        Job.Kind.CLASSIFY: answers.classify,
    }[Job.Kind(kind)]


def _fail(lease: Lease, error: str) -> None:
    try:
        finish(lease.claim, Job.State.FAILED, error=error)
    except LeaseLost:
        log.warning("job %s failed, but it is somebody else's now", lease.claim.job_id)
