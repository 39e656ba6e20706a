"""NorMuon by Li, Liu, Liang, Chen and Zhao (arXiv 2510.05491); modded-nanogpt has it since record 41.

Muon whose update is then normalised neuron by neuron, by a running mean of its squares as in Adam, and brought back to the
length that it had. So it remains a spectral update to first order; the coordinate check with a control confirms it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from speedrun_mup.core.mup.spec import ParamSpec
from speedrun_mup.core.optimizers.muon import Muon
from speedrun_mup.core.optimizers.optimizer import State
from speedrun_mup.core.optimizers.sharding import ParamShard

FLOOR = 1e-10  # of second moments and of norms


class NorMuon(Muon):
    """Muon with a second moment for each neuron. Hyperparameters as Muon's, and:

    beta2: decay of the second moment, which is not corrected for its bias (0.95 up to record 77, then 0.9). neuron_dim:
    which dimension of a stored matrix counts neurons, -2 or -1: the longer side at base width, of equal ones the output.
    """

    label = "NorMuon"
    defaults = Muon.defaults | {"orthogonalizer": "polar-express", "beta2": 0.95, "neuron_dim": -2}
    state_names = ("momentum_buffer", "second_moment")

    @classmethod
    def options_for(cls, spec: ParamSpec) -> dict[str, Any]:
        """The side with the neurons, by what was declared: a shape would say something else at another width."""
        side = "out" if spec.base_fan_out >= spec.base_fan_in else "in"
        return {"neuron_dim": -2 if spec.layout[-2] == side else -1}

    def _state_shape(self, name: str, shard: ParamShard) -> tuple[int, ...]:
        neurons = shard.unit[shard.members[0].group["neuron_dim"]]
        return (neurons,) if name == "second_moment" else shard.unit

    def update(self, gradient: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Muon's update, normalised."""
        update, new_state = super().update(gradient, state, group)
        update, moment = normalise(update, state["second_moment"], group["beta2"], group["neuron_dim"])
        return update, new_state | {"second_moment": moment}


def _other(dim: int) -> int:
    return -3 - dim


def normalise(update: Tensor, second_moment: Tensor, beta2: float, neuron_dim: int) -> tuple[Tensor, Tensor]:
    """Divide each neuron by the root of its second moment, and keep the Frobenius norm of each matrix.

    Args:
        update: (N, d_out, d_in).
        second_moment: (N, neurons), float32.
        beta2: its decay.
        neuron_dim: dimension of `update` that counts neurons.

    Returns:
        The normalised update and the new second moment.
    """
    wide, other = update.float(), _other(neuron_dim)
    second_moment = second_moment.lerp(wide.square().mean(other), 1 - beta2)
    scaled = wide * second_moment.clamp_min(FLOOR).rsqrt().unsqueeze(other)
    kept = wide.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(FLOOR)
    return (scaled * kept).to(update.dtype), second_moment
