"""Hurts real workers, supervisors, a gateway and a Redis of its own, and looks for lost and doubled jobs.

python -m tests.torture [--only kill,redis] [--seed 1] [--size 0.1]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.tiny_bundle import save_roomy_bundle, save_tiny_bundle
from tests.torture import load, losses, tools
from tests.torture.report import Check, table

SCENARIOS: dict[str, Callable[[Path, Path, int, float], list[Check]]] = {
    "kill": losses.kill_and_term,
    "supervisor": losses.kill_supervisor,
    "stop": losses.stop_and_continue,
    "hung": losses.hung_gpu,
    "redis": losses.redis_killed,
    "poison": losses.poisoned,
    "paused": losses.paused,
    "rq": tools.rq_beside,
    "queue": load.long_queue,
    "idle": load.idle_worker,
}


def main() -> int:
    """Run the scenarios one after the other; 1 if one found what must not be."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, comma-separated: %(default)s")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--size", type=float, default=1.0, help="share of the jobs and injuries")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--keep", type=Path, help="keep logs and data in this folder")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(SCENARIOS)):
        parser.error(f"no scenario is called {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    print(f"seed {options.seed}, size {options.size:g}: {', '.join(chosen)}", flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="darkroom-torture-") as place:
        folder = options.keep or Path(place)
        bundle = save_tiny_bundle(folder / "tiny")
        if "paused" in chosen:
            save_roomy_bundle(folder / "roomy")
        for name in chosen:
            started = time.monotonic()
            try:
                checks = SCENARIOS[name](folder / name, bundle, options.seed, options.size)
            except Exception as error:
                traceback.print_exc()
                checks = [Check("ran to its end", repr(error)[:200], "yes", ok=False)]
            results.append((name, time.monotonic() - started, checks))
            print(table(results[-1:]), flush=True)
    ok = all(check.ok for _, _, checks in results for check in checks)
    text = f"Seed {options.seed}, {sum(seconds for _, seconds, _ in results):.0f} s.\n\n{table(results)}\n"
    if len(results) > 1:
        print(f"\n{text}\n{'all is well' if ok else 'SOMETHING IS WRONG'}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
