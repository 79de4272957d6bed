"""Eviction policies on traces: what part of the touches would be faults.

The policies are the real classes, asked as the pager asks them: they see that a block comes in, and, when a victim is
wanted, whether a block was used since the last sample. A sample begins whenever a quarter as many blocks have come in
as memory holds. `lru` and `optimal`, which drops what is used again last, are there for comparison; no pager can be
either.

Usage: python benchmarks/policy.py [--blocks 4000] [--touches 200000] [--plot FILE.svg] [--json FILE]
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import json
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from userfault.blocks.policies import POLICIES, make_policy

SAMPLES = 4
"""So many samples while as many blocks come in as memory holds, as in the pager."""
OVERCOMMIT = 2, 4, 10


def zipf(blocks: int, touches: int) -> list[int]:
    """Popularity of pages by Zipf's law, 0.99; 16 pages in a block, scattered."""
    pages = blocks * 16
    weights = list(itertools.accumulate(1 / (rank + 1) ** 0.99 for rank in range(pages)))
    rng = random.Random(1)
    places = list(range(pages))
    rng.shuffle(places)
    return [places[bisect.bisect_left(weights, rng.random() * weights[-1])] // 16 for _ in range(touches)]


def uniform(blocks: int, touches: int) -> list[int]:
    """Any block, all alike."""
    rng = random.Random(2)
    return [rng.randrange(blocks) for _ in range(touches)]


def popular_and_scan(blocks: int, touches: int) -> list[int]:
    """Every second touch is the next of a scan that never ends; the others follow Zipf's law."""
    popular = zipf(blocks, touches)
    return [block if step % 2 else step // 2 % blocks for step, block in enumerate(popular)]


def loop(blocks: int, touches: int) -> list[int]:
    """From the first to the last, again and again."""
    return [step % blocks for step in range(touches)]


def phases(blocks: int, touches: int) -> list[int]:
    """An eighth of the data, at random, then another eighth that half overlaps it."""
    rng, part = random.Random(4), blocks // 8
    return [(step // (6 * part) * part // 2 + rng.randrange(part)) % blocks for step in range(touches)]


TRACES: dict[str, Callable[[int, int], list[int]]] = {
    "zipf": zipf,
    "uniform": uniform,
    "zipf + scan": popular_and_scan,
    "loop": loop,
    "phases": phases,
}


def faults(policy_name: str, trace: Sequence[int], memory: int, *, samples: bool = True) -> int:
    """Count the faults of a trace when memory holds so many blocks."""
    policy = make_policy(policy_name)
    policy.resize(memory)
    inside: set[int] = set()
    touched: set[int] = set()
    found: set[int] = set()
    fresh: set[int] = set()
    missed = begun = 0

    def used(block: int) -> bool:
        was = block in found
        found.discard(block)
        return was

    for block in trace:
        touched.add(block)
        if block in inside:
            continue
        missed += 1
        if samples and policy.asks and missed - begun >= max(1, memory // SAMPLES):
            found |= (touched & inside) - fresh
            touched.clear()
            fresh.clear()
            begun = missed
        if len(inside) == memory:
            victim = policy.victim(used)
            inside.remove(victim)
            found.discard(victim)
        inside.add(block)
        fresh.add(block)
        policy.admit(block)
    return missed


def lru_faults(trace: Sequence[int], memory: int) -> int:
    """Count the faults if the block that was used longest ago is dropped."""
    inside: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for block in trace:
        if block in inside:
            inside.move_to_end(block)
            continue
        missed += 1
        if len(inside) == memory:
            inside.popitem(last=False)
        inside[block] = None
    return missed


def optimal_faults(trace: Sequence[int], memory: int) -> int:
    """Count the faults if the block is dropped whose next use is furthest (Belady, 1966)."""
    following = [len(trace)] * len(trace)
    last: dict[int, int] = {}
    for step in range(len(trace) - 1, -1, -1):
        following[step] = last.get(trace[step], len(trace) + trace[step])
        last[trace[step]] = step
    inside: dict[int, int] = {}
    queue: list[tuple[int, int]] = []
    missed = 0
    for step, block in enumerate(trace):
        if block not in inside:
            missed += 1
            while len(inside) == memory:
                use, victim = heapq.heappop(queue)
                if inside.get(victim) == -use:
                    del inside[victim]
        inside[block] = following[step]
        heapq.heappush(queue, (-following[step], block))
    return missed


def simulate(blocks: int, touches: int) -> list[dict[str, object]]:
    """Return a row for each trace and overcommit: the part of the touches that fault, by policy."""
    rows: list[dict[str, object]] = []
    for name, make in TRACES.items():
        trace = make(blocks, touches)
        for overcommit in OVERCOMMIT:
            memory = blocks // overcommit
            missed = {policy: faults(policy, trace, memory) for policy in POLICIES}
            missed["s3fifo, no samples"] = faults("s3fifo", trace, memory, samples=False)
            missed["lru"] = lru_faults(trace, memory)
            missed["optimal"] = optimal_faults(trace, memory)
            rows.append({"trace": name, "overcommit": overcommit} | {p: n / touches for p, n in missed.items()})
        print(f"{name} done", file=sys.stderr)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as text."""
    columns = list(rows[0])[2:]
    lines = [f"{'trace':<12} {'x':>3}" + "".join(f"{column:>{len(column) + 3}}" for column in columns)]
    for row in rows:
        figures = "".join(f"{row[column]:>{len(column) + 3}.3f}" for column in columns)
        lines.append(f"{row['trace']:<12} {row['overcommit']:>3}{figures}")
    return "\n".join(lines)


def plot(target: Path, rows: list[dict[str, object]]) -> None:
    """Draw bars, one group for each trace at four times what memory holds, where matplotlib is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    mpl.use("svg")
    from matplotlib import pyplot as plt

    chosen = [row for row in rows if row["overcommit"] == 4]
    columns = list(rows[0])[2:]
    figure, axes = plt.subplots(figsize=(10, 4))
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places = [group + number * width for group in range(len(chosen))]
        axes.bar(places, [float(str(row[column])) for row in chosen], width, label=column)
    axes.set_xticks([group + 0.4 for group in range(len(chosen))], [str(row["trace"]) for row in chosen])
    axes.set_ylabel("faults a touch, at x 4")
    axes.legend(ncols=4, fontsize="small")
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Simulate, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Eviction policies on traces.")
    parser.add_argument("--blocks", type=int, default=4000)
    parser.add_argument("--touches", type=int, default=200_000)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = simulate(options.blocks, options.touches)
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(options.plot, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
