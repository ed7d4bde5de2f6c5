"""What `quantization_config` says: that a checkpoint was compiled by qpc, or how to compile a model while it is read."""

from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from qpc.errors import CheckpointError, SettingsError
from qpc.integrations.transformers import METHOD

if TYPE_CHECKING:
    from qpc.report import Report


class QPaletteConfig(QuantizationConfigMixin):
    """Given to `from_pretrained`, the options of `qpc.compile`; in the config.json of a checkpoint, a few facts and where the rest is.

    format_version, bits_per_weight, manifest: of a checkpoint; None in a request.
    """

    def __init__(
        self,
        budget: Any = None,
        *,
        format_version: int | None = None,
        bits_per_weight: float | None = None,
        manifest: str | None = None,
        quant_method: str = METHOD,
        **options: Any,
    ) -> None:
        """budget, options: as `qpc.compile` takes them, without `example_inputs`, `sensitivities` and `progress`.

        Raises `SettingsError` or another `QpcError` for an option that is unknown or means nothing, `CheckpointError` for facts of a
        checkpoint that this version does not read.
        """
        if quant_method != METHOD:
            raise SettingsError(f"quant_method={quant_method!r} is not one of qpc, which is {METHOD!r}")
        self.quant_method: Any = METHOD
        self.budget, self.options = budget, options
        self.format_version, self.bits_per_weight, self.manifest = format_version, bits_per_weight, manifest
        if format_version is None:
            self._check_request()
        else:
            self._check_facts()

    def _check_request(self) -> None:
        from qpc.options import Options

        if self.budget is None:
            if self.options:
                raise SettingsError(f"options without a budget: {', '.join(self.options)}; say QPaletteConfig(budget=3.25, ...)")
            return
        try:
            Options.of(self.budget, **self.options)
        except TypeError as error:
            raise SettingsError(f"QPaletteConfig takes the options of qpc.compile: {error}") from error

    def _check_facts(self) -> None:
        from qpc.checkpoint import FORMAT_VERSION, MANIFEST

        if self.format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"config.json says format version {self.format_version!r}, this qpc reads {FORMAT_VERSION}; use the version that wrote it"
            )
        if self.manifest != MANIFEST or self.budget is not None or self.options:
            raise CheckpointError(
                f"the quantization_config of a checkpoint of version {FORMAT_VERSION} holds format_version, bits_per_weight and "
                f"manifest={MANIFEST!r} alone, got {vars(self)}; the checkpoint is damaged"
            )

    @staticmethod
    def of(report: "Report") -> "QPaletteConfig":
        """The facts about a compiled model."""
        from qpc.checkpoint import FORMAT_VERSION, MANIFEST

        return QPaletteConfig(format_version=FORMAT_VERSION, bits_per_weight=round(report.bits_per_weight, 4), manifest=MANIFEST)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds. In a request, values that JSON cannot hold are shown as text."""
        if self.format_version is not None:
            facts = {"format_version": self.format_version, "bits_per_weight": self.bits_per_weight, "manifest": self.manifest}
            return {"quant_method": METHOD} | facts
        plain = (str, int, float, type(None))
        request = {"budget": self.budget} | self.options
        return {"quant_method": METHOD} | {key: value if isinstance(value, plain) else str(value) for key, value in request.items()}
