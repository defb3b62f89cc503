"""What one layer sees and is to give, at some positions, and the regressions on that.

Everything that the closed forms in `factors` need of images is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# What the closed forms compute in, whatever the user's own defaults are.
NEW: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
FLOOR = 0.03  # of the mean of a metric's eigenvalues, below which none of them falls


@dataclass
class Rows:
    """What a layer sees and what it is to give, at N positions.

    Attributes:
        patches: (N, I, H, W), what meets the kernel.
        outputs: (N, O), what is wanted, with the bias in it and before an activation.
        metric: (O, O); an error e of the outputs is e^T metric e at the end of the network.
        weight: (O, I, H, W), the old kernel.
    """

    patches: Tensor
    outputs: Tensor
    metric: Tensor
    weight: Tensor

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """The square root of the metric, and its inverse."""
        values, vectors = torch.linalg.eigh(self.metric.double())
        values = values.clamp_min(0)
        values = values + FLOOR * values.mean() if values.mean() > 0 else torch.ones_like(values)
        root = (vectors * values.sqrt()) @ vectors.T
        inverse = (vectors * values.rsqrt()) @ vectors.T
        return root.float(), inverse.float()

    @cached_property
    def responses(self) -> Responses:
        """What the old kernel gives for the patches, without a bias."""
        old = self.weight.flatten(1).T
        given = self.patches.flatten(1) @ old
        return Responses(self, given - given.mean(0), given.mean(0), old, old)

    @cached_property
    def noise(self) -> float:
        """Variance of the noise that is added to what is seen, to stand for what isn't.

        Of the variance of what is seen, the share that patches have numbers for each of the rows:
        a covariance is shrunk by about as much where its entries are estimated from so few (Ledoit
        and Wolf 2004). With 0.002 of the variance instead, VGG16 compressed four times, in closed
        form alone, had a cosine of 0.72 at block5_pool on other photographs; with 0.8 of this share
        0.91. More than half of the variance would leave the images without a say.
        """
        share = min(0.5, self.patches[0].numel() / len(self.patches))
        return share * float(self.patches.var()) + 1e-30

    @cached_property
    def columns(self) -> Basis:
        """Projections of the columns of a patch; what they give is (N, rank W)."""
        seen = self.patches.permute(0, 3, 1, 2).flatten(2)  # (N, W, I H)
        return Basis(self, seen, self.weight.permute(1, 2, 3, 0).flatten(0, 1))  # (I H, W, O)

    @cached_property
    def pixels(self) -> Basis:
        """Projections of the pixels of a patch; what they give is (N, rank H W)."""
        seen = self.patches.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H W, I)
        return Basis(self, seen, self.weight.permute(1, 2, 3, 0).flatten(1, 2))  # (I, H W, O)

    def error(self, given: Tensor) -> float:
        """Mean error of outputs (N, O) in the metric."""
        return float(((given - self.outputs) @ self.roots[0]).square().sum(1).mean())


class Basis:
    """Projections of parts of a patch, the most telling first, and regressions on what they give.

    They are the left singular vectors of the kernel as a matrix from such parts to outputs, where
    parts are measured by their second moment and outputs by the metric.
    """

    def __init__(self, rows: Rows, seen: Tensor, kernel: Tensor) -> None:
        self.rows, self.seen, self.kernel = rows, seen, kernel  # (N, P, D) and (D, P, O)
        flat = seen.flatten(0, 1)
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        values = values.clamp_min(0) + rows.noise
        white = (vectors * values.sqrt()).T @ (kernel @ rows.roots[0]).flatten(1)
        _, left = torch.linalg.eigh(white @ white.T)
        self.down = (vectors * values.rsqrt()) @ left.flip(1)  # (D, D)
        self.rank = 0

    def _project(self, rank: int) -> None:
        """Know what the first projections give, and its moments; those of fewer are in them."""
        if rank <= self.rank:
            return
        down, parts = self.down[:, :rank], self.seen.shape[1]
        x = (self.seen @ down).transpose(1, 2).flatten(1)  # (N, rank P)
        self.mean, self.x = x.mean(0), x - x.mean(0)
        size, noise = len(x), self.rows.noise
        second = noise * torch.kron(down.T @ down, torch.eye(parts, **NEW))
        wanted = noise * torch.einsum("dr,dpo->rpo", down, self.kernel).flatten(0, 1)
        self.second = second + self.x.T @ self.x / size
        self.wanted = wanted + self.x.T @ (self.rows.outputs - self.rows.outputs.mean(0)) / size
        self.rank = rank

    def regress(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `rank` projections (rank, D), and the matrix (rank P, O) and the bias (O).

        With these, what the projections give comes nearest to the outputs.
        """
        self._project(rank)
        size = rank * self.seen.shape[1]
        second = self.second[:size, :size].double()
        second.diagonal().add_(1e-6 * second.diagonal().mean())
        factor = torch.linalg.cholesky(second)
        matrix = torch.cholesky_solve(self.wanted[:size].double(), factor).float()
        bias = self.rows.outputs.mean(0) - self.mean[:size] @ matrix
        return self.down[:, :rank].T, matrix, bias

    def given(self, rank: int, matrix: Tensor) -> Responses:
        """What the projections and a matrix give."""
        down, parts = self.down[:, :rank], self.seen.shape[1]
        kernel = torch.einsum("dr,rpo->dpo", down, matrix.reshape(rank, parts, -1))
        given = self.x[:, : len(matrix)] @ matrix
        mean = self.mean[: len(matrix)] @ matrix
        return Responses(self.rows, given, mean, kernel.flatten(0, 1), self.kernel.flatten(0, 1))


class Responses:
    """Outputs that are given, and how they come through fewer channels.

    Reduced-rank regression onto the wanted outputs, in their metric: the asymmetric reconstruction
    of Zhang et al. 2016.

    Args:
        rows: the wanted outputs.
        given: the outputs that are given less their mean, (N, O).
        mean: their mean, (O).
        kernel: the matrix (D, O) that gives them of a patch.
        old: the matrix (D, O) that gives what is wanted.
    """

    def __init__(
        self, rows: Rows, given: Tensor, mean: Tensor, kernel: Tensor, old: Tensor
    ) -> None:
        root, self.inverse = rows.roots
        # In float64, because what comes of few projections is of no full rank.
        x, y = given.double(), (rows.outputs - rows.outputs.mean(0)).double()
        kernel, old = kernel.double(), old.double()
        second = x.T @ x / len(x) + rows.noise * kernel.T @ kernel
        wanted = x.T @ y / len(x) + rows.noise * kernel.T @ old
        damped = second + (1e-9 * second.trace() + 1e-30) * torch.eye(len(second), **NEW)
        matrix = torch.cholesky_solve(wanted, torch.linalg.cholesky(damped)) @ root.double()
        _, vectors = torch.linalg.eigh(matrix.T @ second @ matrix)
        self.vectors, self.matrix = vectors.flip(1).float(), matrix.float()  # (O, O)
        self.mean, self.wanted_mean = mean, rows.outputs.mean(0)

    def cut(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Down (rank, O), up (O, rank) and the bias (O), with which they come nearest."""
        kept = self.vectors[:, :rank]
        down, up = (self.matrix @ kept).T, self.inverse @ kept
        return down, up, self.wanted_mean - up @ (down @ self.mean)
