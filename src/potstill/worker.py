"""One of several processes that train a run's students side by side: ``python -m potstill.worker RUN IDENTITY [MODULE ...]``.

Every worker goes through the same list and takes the jobs that nobody holds a lock on, so that workers need no queue,
and one that is killed leaves its job to the next.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .errors import BadInput, Locked

# Longer than a killed run's worker needs to finish its update and notice that its parent is gone.
PATIENCE_SECONDS = 60.0


def work(run: Path, identity: str, allowed: tuple[str, ...]) -> None:
    """Train every student of the run that is not done and that no other worker is at."""
    import torch

    from . import config
    from .distill.loop import accelerator, watch_parent
    from .jobs import Workshop, is_done, jobs, make_student
    from .state import lock

    recipe = config.read(run / "recipe.yaml")
    if recipe.compute.threads:
        torch.set_num_threads(recipe.compute.threads)
    shop = Workshop(recipe, run, allowed)
    engine = accelerator(str(shop.device))
    keep_going = watch_parent()
    for patience in (0.0, PATIENCE_SECONDS):
        for job in jobs(recipe):
            if is_done(run, job, identity):
                continue
            try:
                with lock(run / "state" / f"{job.arm.title}-{job.seed}.lock", patience):
                    if not is_done(run, job, identity):
                        make_student(shop, job, identity, engine, keep_going=keep_going)
            except Locked:
                continue


def main() -> int:
    """Exit codes as of the command line."""
    run, identity, *allowed = sys.argv[1:]
    try:
        work(Path(run), identity, tuple(allowed))
    except KeyboardInterrupt:
        return 130
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
