"""Settings of what becomes of the trained model."""

import re

from pydantic import Field, model_validator

from dpo_jax.settings import Section

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


class ExportSettings(Section):
    """Where the trained model goes, beside the folder `model` of the output."""

    push: str | None = Field(
        default=None,
        description="OWNER/NAME of a hub repository that the result is pushed to; "
        "the token is that of HF_TOKEN or of `hf auth login`",
    )
    private: bool = Field(default=True, description="whether that repository is private")

    @model_validator(mode="after")
    def _names_a_repository(self) -> "ExportSettings":
        if self.push is not None and not REPOSITORY.fullmatch(self.push):
            raise ValueError("export.push: must be OWNER/NAME, a repository of the hub")
        if self.push is None and not self.private:
            raise ValueError("export.private: nothing is pushed without export.push; leave it out")
        return self
