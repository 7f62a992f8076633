"""What is asked of an sglang-router in front of servers that run already.

It chooses a worker for each sample; weights, probes and health checks go to the workers themselves.
"""

from __future__ import annotations

import logging
from urllib.parse import quote

from megatron_dgpo.rollout.sglang.web import Http, ServerError, ServerGone

log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 10.0
_NOT_FOUND = 404


class RouterFailed(RuntimeError):
    """Samples do not come back through the router, although its workers are well."""


async def take_out(http: Http, router: str, worker: str) -> None:
    """Have the router send a worker nothing any more; where it does not, the log says so.

    Its workers are named by id, by URL or in a query, depending on the release.
    """
    try:
        names = await _names(http, router, worker)
        for k, name in enumerate(names):
            try:
                await _call(http, router, f"/workers/{quote(name, safe='')}", "DELETE")
                break
            except ServerError:
                if k + 1 == len(names):
                    raise
    except ServerError as error:
        if error.status != _NOT_FOUND:
            _warn(router, worker, error)
            return
        try:  # a release before 0.2
            await _call(http, router, f"/remove_worker?url={quote(worker, safe='')}", "POST")
        except (ServerError, ServerGone) as old:
            _warn(router, worker, old)
    except ServerGone as error:
        _warn(router, worker, error)


async def _names(http: Http, router: str, worker: str) -> list[str]:
    """What the router may call a worker; nothing when it does not have it."""
    answer = await _call(http, router, "/workers", "GET")
    workers = answer.get("workers") if isinstance(answer, dict) else None
    found = [w for w in workers or [] if isinstance(w, dict) and str(w.get("url")).rstrip("/") == worker]
    return [str(name) for w in found for name in (w.get("id"), w.get("url")) if name]


async def _call(http: Http, router: str, path: str, method: str) -> object:
    return await http.request(router, path, timeout=_TIMEOUT_SECONDS, method=method)


def _warn(router: str, worker: str, error: Exception) -> None:
    log.warning("router %s may go on sending to worker %s, which counts as dead: %s", router, worker, error)
