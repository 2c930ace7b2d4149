"""How fast is a grid of linear probes trained together, beside the same probes trained one by one?

Both run the same code, with all heads of the grid or with one. The timing starts with the extracted features and ends
with the scores. Before the timing, both are checked to give the same predictions. Each fold tests on a fifth of the
images and validates on a tenth, as in a real task.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common.measuring import in_turn, options, positive, publish, timed
from torch import Tensor

from modan_fast.config import EvaluateConfig
from modan_fast.devices import pick_device
from modan_fast.downstream.labels import cells_of
from modan_fast.downstream.probe import train_heads
from modan_fast.downstream.tasks import Fold, FoldRun, Task
from modan_fast.encoders import Encoder


def task_of(images: int) -> Task:
    """A task of `images` images without pixels, whose classes alternate."""
    rows = np.random.default_rng(0).permutation(images)
    tenths = np.array_split(rows, 10)
    folds = []
    for first in range(0, 10, 2):
        test, val = np.concatenate(tenths[first : first + 2]), tenths[(first + 2) % 10]
        folds.append(Fold(np.setdiff1d(rows, np.concatenate([test, val])), val, test))
    names = tuple(str(row) for row in range(images))
    return Task(
        name="synthetic",
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
    parser = options(__doc__)
    parser.add_argument(
        "--images", type=positive, default=349, help="of the task; 349 are those of the thyroid task"
    )
    parser.add_argument("--repeats", type=positive, default=10, help="of five folds; 10 give 50 probes")
    parser.add_argument("--epochs", type=positive, default=10, help="of each probe")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)

    task = task_of(arguments.images)
    config = EvaluateConfig(init=("scratch",), epochs=arguments.epochs).resolved()
    fold_runs = [FoldRun(repeat, fold) for repeat in range(1, arguments.repeats + 1) for fold in range(1, 6)]
    cells = cells_of(task, fold_runs, config.seed)
    shape = (arguments.images, Encoder().num_features)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    features = (noise + 0.1 * torch.from_numpy(task.labels)[:, None]).to(device)

    def together() -> Tensor:
        return train_heads(features, task, cells, config).scores

    def one_by_one() -> Tensor:
        return torch.cat([train_heads(features, task, [cell], config).scores for cell in cells])

    scores, alone = together(), one_by_one()
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)
    largest = float((scores - alone).abs().max())

    names = f"{len(fold_runs)} probes together", f"{len(fold_runs)} probes one by one"
    turns: dict[str, Callable[[], list[float]]] = {
        names[0]: partial(timed, together, device, times=5),
        names[1]: partial(timed, one_by_one, device),
    }
    publish(
        "probe",
        in_turn(turns, arguments.rounds, "s"),
        unit="s a grid",
        ratios=[(names[1], names[0])],
        notes=[
            f"{shape[0]} images, {shape[1]} features, {arguments.epochs} epochs, batches of {config.batch_size}, "
            f"{torch.get_num_threads()} threads; feature extraction is not timed.",
            f"The same code trains all probes or one; their scores differ by {largest:.1g} at most.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
