"""All new layers trained at once, until the network behind them sees what it saw before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggtorch.compression.statistics import to_unit_size
from vggtorch.compression.work import Work
from vggtorch.surgery import Descent, copies, descend_, write_

LEARNING_RATE = 1e-3  # of the size of a weight; larger steps diverged
BATCH = 8
CHECK = 20  # steps from one look at the held-out images to the next
DEEPER = 2.0  # how many times as much as the map before it each map counts

Maps = Callable[[Tensor], Sequence[Tensor]]  # a network that returns its maps of a batch


def distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error of each map relative to its size, by image; deeper maps count more."""
    errors = []
    for y, t in zip(outputs, targets, strict=True):
        errors.append(((y - t).flatten(1) * to_unit_size(t)).square().sum(1).mean())
    weights = DEEPER ** errors[0].new_tensor(range(len(errors)))
    return torch.stack(errors) @ weights / weights.sum()


def train_(
    work: Work,
    network: Maps,
    reference: Maps,
    trained: Sequence[Tensor],
    steps: int,
    seconds: float,
) -> Descent:
    """Train the new layers' parameters, in place, until a network gives what the original does.

    Adam, with steps of a thousandth of each weight's size at first, which fall to nothing;
    `seconds` are those of the whole run, and `work` has notes of where to go on.
    """
    if not trained:  # composing layers was enough
        return Descent()
    work.progress.begin("training", 1.0)
    groups = [
        {"params": [p], "lr": 0.0, "size": float(p.detach().norm()) / p.numel() ** 0.5}
        for p in trained
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(work.seed + 2)
    state = None
    if (noted := work.notes["state"]) is not None:
        weights, optimized, drawn = (noted[name] for name in ("weights", "optimizer", "generator"))
        write_(trained, weights)
        optimizer.load_state_dict(optimized)
        generator.set_state(drawn)
        state = Descent(*(noted[name] for name in ("step", "seconds", "best", "kept")))
    targets = [reference(x) for x in work.checked]

    def step_(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["size"] * rate
        x = work.images.crops(BATCH, generator)
        wanted = reference(x)
        optimizer.zero_grad()
        distance(network(x), wanted).backward()
        optimizer.step()

    @torch.no_grad()
    def error() -> float:
        pairs = zip(work.checked, targets, strict=True)
        values = [float(distance(network(x), t)) for x, t in pairs]
        return sum(values) / len(values)

    state = state or Descent(best=error(), kept=copies(trained))

    def show(done: float) -> None:
        work.progress.reach(done, f"held-out error {state.best:.4f}")

    def looked(done: float) -> None:
        work.notes["state"] = {
            **vars(state),
            "weights": copies(trained),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
        }
        show(done)

    show(state.step / max(steps, 1))
    left = seconds - (work.notes.seconds - state.seconds)
    descend_(state, trained, step_, error, looked, steps=steps, seconds=left, every=CHECK)
    return state
