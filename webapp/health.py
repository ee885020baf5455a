"""Is everything there that a person needs? The database, Redis, and a living worker on each queue."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.views.decorators.cache import never_cache
from redis import Redis, RedisError

from webapp.jobs.models import Job

BEAT_KEY = "fewshot:worker:{queue}"
BEAT_EVERY_S = 3
BEAT_LASTS_S = 15


@login_not_required
@never_cache
def healthz(request: HttpRequest) -> JsonResponse:
    """200 when all is well, 503 with the name of what is not."""
    state = {"database": _database_answers(), **_redis_and_workers()}
    is_well = all(state.values())
    return JsonResponse({"ok": is_well, **state}, status=200 if is_well else 503)


def redis_client() -> Redis:
    return Redis.from_url(settings.REDIS_URL, socket_timeout=2, socket_connect_timeout=2)


def _database_answers() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            return bool(cursor.fetchone() == (1,))
    except Exception:  # whatever the driver throws, the answer is no
        return False


def _redis_and_workers() -> dict[str, bool]:
    queues = Job.Queue.values
    try:
        with redis_client() as redis:
            beats = redis.mget([BEAT_KEY.format(queue=queue) for queue in queues])
    except RedisError:
        return {"redis": False, **dict.fromkeys(queues, False)}
    return {"redis": True, **{queue: beat is not None for queue, beat in zip(queues, beats, strict=True)}}
