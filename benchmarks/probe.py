"""How fast is a grid of linear probes trained together, beside the same probes trained one by one?

Both are the same code, given all heads of the grid or one; what is timed begins with the features at hand and ends
with the scores. Both are checked to give the same predictions before any is timed. Folds have the sizes of a task's:
five parts, of which one is for testing and a half for validation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import device_of, in_turn, options, positive, publish, synchronise
from torch import Tensor

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.probe import train_heads
from modan_fast.downstream.tasks import FoldRun, Fold, Task
from modan_fast.models import FEATURES


def made_task(images: int) -> Task:
    """A task of so many images, without any pixels, whose classes alternate."""
    rows = np.random.default_rng(0).permutation(images)
    parts = np.array_split(rows, 10)
    folds = []
    for fold in range(5):
        test, val = np.concatenate(parts[2 * fold : 2 * fold + 2]), parts[(2 * fold + 2) % 10]
        folds.append(Fold(np.setdiff1d(rows, np.concatenate([test, val])), val, test))
    names = tuple(str(row) for row in range(images))
    return Task(
        name="made",
        folder=Path(),
        images=names,
        labels=np.arange(images) % 2,
        folds=tuple(folds),
        sources=names,
        digests=names,
        patients=(),
        positive="1",
        sha256="",
    )


def main() -> None:
    parser = options((__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--images", type=positive, default=349, help="of the task; 349 are those of the thyroid task"
    )
    parser.add_argument("--repeats", type=positive, default=10, help="of five folds; 10 give 50 probes")
    parser.add_argument("--epochs", type=positive, default=10, help="of each probe")
    arguments = parser.parse_args()
    device = device_of(arguments.device)

    task = made_task(arguments.images)
    config = EvaluateConfig(init=("made",), epochs=arguments.epochs).resolved()
    fold_runs = [FoldRun(repeat, fold) for repeat in range(1, arguments.repeats + 1) for fold in range(1, 6)]
    noise = torch.randn(arguments.images, FEATURES, generator=torch.Generator().manual_seed(0))
    features = (noise + 0.1 * torch.from_numpy(task.labels)[:, None]).to(device)

    def together() -> Tensor:
        return train_heads(features, task, fold_runs, config)[0]

    def one_by_one() -> Tensor:
        return torch.cat([train_heads(features, task, [fold_run], config)[0] for fold_run in fold_runs])

    scores, alone = together(), one_by_one()
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)
    largest = float((scores - alone).abs().max())

    def turn(candidate: Callable[[], Tensor], times: int) -> Sequence[float]:
        """Seconds of each of the times that a turn trains the grid."""
        taken = []
        for _ in range(times):
            synchronise(device)
            start = time.perf_counter()
            candidate()
            synchronise(device)
            taken.append(time.perf_counter() - start)
        return taken

    names = f"{len(fold_runs)} probes together", f"{len(fold_runs)} probes one by one"
    measured = in_turn(
        {names[0]: lambda: turn(together, 5), names[1]: lambda: turn(one_by_one, 1)}, arguments.rounds, "s"
    )
    publish(
        "probe",
        measured,
        unit="s a grid",
        ratios={f"{names[1]} / {names[0]}, of medians": median(measured[names[1]]) / median(measured[names[0]])},
        notes=[
            f"{arguments.images} images, {FEATURES} features, {arguments.epochs} epochs, batches of "
            f"{config.batch_size}, {torch.get_num_threads()} threads; the features are at hand.",
            f"The same code is given all probes or one; their scores differ by {largest:.1g} at most.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
