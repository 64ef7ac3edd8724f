"""Settings of an adapter (LoRA): what is trained in place of the whole model."""

from pydantic import Field, model_validator

from dpo_jax.settings import Section

ALL_LINEAR, EXPERTS, ROUTER, PEFT_DEFAULT = "all-linear", "experts", "router", "default"
GROUPS = (ALL_LINEAR, EXPERTS, ROUTER, PEFT_DEFAULT)
"""What `adapter.targets` knows beside names of modules."""
SHAPE = ("rank", "alpha", "targets", "layers", "rank_pattern", "alpha_pattern", "rslora", "dora", "modules_to_save")
"""Settings that say what a new adapter is; one that is gone on with has its own."""


class AdapterSettings(Section):
    """What is trained in place of the whole model: low-rank factors beside some of its matrices (LoRA).

    Without rank and path the whole model is trained.
    """

    rank: int | None = Field(
        default=None,
        gt=0,
        le=4096,
        description="columns of A and rows of B; with it the model's own weights stay as they are, and what is trained "
        "is a few hundredths of their number (null trains the whole model)",
    )
    alpha: float | None = Field(
        default=None, gt=0, description="the product A B is scaled by alpha / rank (default: twice the rank)"
    )
    targets: str | tuple[str, ...] = Field(
        default=ALL_LINEAR,
        description="which matrices: names as the folder has them (q_proj, or any end of a module's path), a regular "
        "expression that matches whole paths, or all-linear (those of attention and MLPs), experts, router, or default "
        "(PEFT's for the family)",
    )
    layers: tuple[int, ...] | None = Field(default=None, description="numbers of the layers, from 0 (default: all)")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of A's inputs that each training step sets to zero, drawn by seed, step, text and position",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    dora: bool = Field(
        default=False,
        description="train the norm of each matrix's columns as well (DoRA, arXiv:2402.09353); export.kind is merged",
    )
    rank_pattern: dict[str, int] | None = Field(
        default=None, description="other ranks by pattern of module paths, such as {down_proj: 32}; the first that fits"
    )
    alpha_pattern: dict[str, float] | None = Field(default=None, description="other alphas, in the same way")
    lr_ratio: float = Field(
        default=1.0, gt=0, description="learning rate of B over that of A (LoRA+, arXiv:2402.12354, which takes 16)"
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(),
        description="regular expressions as in model.freeze; leaves that match are trained whole, beside the factors, "
        "and export.kind is merged",
    )
    path: str | None = Field(
        default=None,
        description="folder (or hub id) of a PEFT adapter to go on from, in place of a new one; its own config says "
        "rank, alpha and targets",
    )
    revision: str | None = Field(default=None, description="as model.revision, for adapter.path")

    @property
    def used(self) -> bool:
        """Whether an adapter is trained."""
        return self.rank is not None or self.path is not None

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterSettings":
        found = []
        if self.revision is not None and self.path is None:
            found.append("adapter.revision: is of adapter.path, which is not given; give both, or neither")
        if self.targets in ("", ()):
            found.append("adapter.targets: names nothing; leave it out for all-linear")
        found += [f"adapter.rank_pattern: {key}: {r}: must be from 1 to 4096" for key, r in _outside(self.rank_pattern)]
        found += [f"adapter.alpha_pattern: {key}: {a}: must be > 0" for key, a in _outside(self.alpha_pattern)]
        if found:
            raise ValueError("\n".join(found))
        return self


def _outside(pattern: dict[str, int] | dict[str, float] | None) -> list[tuple[str, float]]:
    whole = pattern is not None and all(isinstance(value, int) for value in pattern.values())
    return [(key, v) for key, v in (pattern or {}).items() if v <= 0 or (whole and v > 4096)]
