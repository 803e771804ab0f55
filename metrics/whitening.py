"""Features moved and scaled so that all their directions vary alike: without labels, and before any fine-tuning."""

from typing import NamedTuple

import torch

SHRINK = 0.1  # of the mean variance, added to each: directions that hardly vary are noise


class Whitening(NamedTuple):
    """x -> (x - mean) scale, with scale = V (E + SHRINK mean(E))^(-1/2) for the covariance V E V^T of what it was
    fitted on (Jegou and Chum, 2012). The directions in which features vary most say what all vehicles have in
    common with others of their kind; cosines of raw features see little else. mean: [D], scale: [D, D] float64."""

    mean: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Whitening":
        """Fitted on [n, D], n of 2 and more."""
        x = features.double()
        values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        values = values.clamp_min(0)
        return cls(x.mean(dim=0), vectors * (values + SHRINK * values.mean()).rsqrt())

    def to(self, device: torch.device) -> "Whitening":
        return Whitening(self.mean.to(device), self.scale.to(device))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, D] float32."""
        return ((features.double() - self.mean) @ self.scale).float()
