"""How large a mixture of experts a machine can train: equation (1) of the paper (section 3.2.1), and its inverse.

D dense parameters (attention, embeddings, gate, norms) keep all states on the device, S sparse parameters (experts)
live in files with the host as a cache, L MoE layers, N devices, alpha the fraction of the experts that a step touches:

    device  16 D + 4 alpha S / L  <= N M_device      one layer's active experts and their gradients
    host    16 alpha S            <= N M_host        active experts with gradients and Adam moments
    file    12 S                  <= N M_file        master weights and both moments

The byte counts are those of mixed precision (2 + 2 for half-precision weight and gradient, 4 + 4 + 4 for master weight
and moments). Training in float32 has no separate master: 16 D, 16 and 12 stay, the device term doubles.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError

TIERS = ("device", "host", "file")


@dataclass(frozen=True)
class BytesPerParameter:
    """Bytes a parameter costs in each tier."""

    dense: int = 16
    device_sparse: int = 4
    host_sparse: int = 16
    file_sparse: int = 12


MIXED_PRECISION = BytesPerParameter()
FLOAT32 = BytesPerParameter(device_sparse=8)


@dataclass(frozen=True)
class Machine:
    """Bytes per device: its own memory, and its share of the host's memory and of the drives."""

    device_bytes: float
    host_bytes: float
    file_bytes: float
    devices: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or min(self.device_bytes, self.host_bytes, self.file_bytes) <= 0:
            raise UserError(f"a machine needs at least one device and positive memory sizes, got {self}")

    def limit(self, tier: str) -> float:
        return {"device": self.device_bytes, "host": self.host_bytes, "file": self.file_bytes}[tier]


@dataclass(frozen=True)
class StoragePlan:
    """Bytes that each tier must hold per device, and whether they fit."""

    device_bytes: float
    host_bytes: float
    file_bytes: float
    fits_device: bool
    fits_host: bool
    fits_file: bool

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host and self.fits_file


@dataclass(frozen=True)
class LargestModel:
    """`sparse` parameters at most, the tier that binds, and what each tier alone would allow."""

    sparse: float
    dense: float
    binding: str
    sparse_by_tier: dict[str, float]

    @property
    def total(self) -> float:
        """P = S + D."""
        return self.sparse + self.dense


def _check(dense: float, layers: float, alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise UserError(f"alpha, the fraction of experts that a step touches, must be in (0, 1], got {alpha}")
    if layers < 1 or dense < 0:
        raise UserError(f"expected at least one MoE layer and no negative counts, got layers={layers}, dense={dense}")


def storage_plan(
    dense: float,
    sparse: float,
    layers: float,
    alpha: float,
    machine: Machine,
    cost: BytesPerParameter = MIXED_PRECISION,
) -> StoragePlan:
    """Equation (1): bytes per device of each tier for a model of `dense` + `sparse` parameters.

    Raises:
        UserError: alpha outside (0, 1], no layers, or negative counts.
    """
    _check(dense, layers, alpha)
    n = machine.devices
    device = (cost.dense * dense + cost.device_sparse * alpha * sparse / layers) / n
    host = cost.host_sparse * alpha * sparse / n
    file = cost.file_sparse * sparse / n
    return StoragePlan(
        device,
        host,
        file,
        device <= machine.device_bytes,
        host <= machine.host_bytes,
        file <= machine.file_bytes,
    )


def largest_model(
    dense: float, layers: float, alpha: float, machine: Machine, cost: BytesPerParameter = MIXED_PRECISION
) -> LargestModel:
    """Equation (1) solved for S: the most expert parameters that a machine can train, and the tier that binds.

    Raises:
        UserError: the dense parameters alone do not fit the devices.
    """
    _check(dense, layers, alpha)
    n = machine.devices
    room = machine.device_bytes * n - cost.dense * dense
    if room <= 0:
        raise UserError(
            f"the dense parameters alone take {cost.dense * dense / n:.4g} bytes per device and "
            f"{machine.device_bytes:.4g} are there; use more devices or a smaller dense part"
        )
    by_tier = {
        "device": room * layers / (cost.device_sparse * alpha),
        "host": machine.host_bytes * n / (cost.host_sparse * alpha),
        "file": machine.file_bytes * n / cost.file_sparse,
    }
    binding = min(TIERS, key=by_tier.__getitem__)
    return LargestModel(by_tier[binding], dense, binding, by_tier)


def all_resident_bytes(dense: float, sparse: float, devices: int = 1) -> float:
    """Bytes per device without tiers: 16 (D + S) / N."""
    return 16 * (dense + sparse) / devices


def ring_bytes(dense: float, sparse: float, layers: int, sections: int, bytes_per_parameter: int = 2) -> float:
    """Device bytes of ring-offload serving (section 3.3.2): the dense part and `sections` layers of experts."""
    return bytes_per_parameter * (dense + sparse * min(sections, layers) / layers)


@dataclass(frozen=True)
class GptMoE:
    """The paper's language model: every layer has an MoE block with expert FFNs of 4 x hidden."""

    name: str
    layers: int
    hidden: int
    vocabulary: int
    experts: int
    positions: int = 1024
    expert_hidden: int = 0

    @property
    def sparse(self) -> int:
        width = self.expert_hidden or 4 * self.hidden
        return self.layers * self.experts * (2 * self.hidden * width + width + self.hidden)

    @property
    def dense(self) -> int:
        attention = 4 * self.hidden * self.hidden + 4 * self.hidden
        norms = 4 * self.hidden
        gate = self.hidden * self.experts
        return (
            self.layers * (attention + norms + gate)
            + (self.vocabulary + self.positions) * self.hidden
            + 2 * self.hidden
        )


def paper_models() -> list[tuple[GptMoE, int, float]]:
    """Rows of the paper's training table: (model, GPUs, parameters in billions that the paper states)."""
    rows = [(8, 13.9), (16, 26.8), (32, 52.6), (64, 104.1), (128, 207.2)]
    return [(GptMoE(f"{p:g}B", 12, 4096, 50304, e), e, p) for e, p in rows]
