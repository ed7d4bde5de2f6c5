"""Every error that qpc raises for its user derives from `QpcError`.

A message shows the actual and the required value, names the layer, and says what to do next. `assert` is kept for internal invariants.
"""


class QpcError(Exception):
    """Base of all errors that a user of qpc can cause and mend."""


class SettingsError(QpcError):
    """An environment variable or option has a value that qpc does not know."""


class ModelError(QpcError):
    """The model cannot be used: missing files, no linear layers, weights that are not finite."""


class CaptureError(QpcError):
    """The model could not be captured as one graph; the message names the module."""


class VerifierError(QpcError):
    """A graph breaks the contract of its stage. This is a defect of a pass, not of the model."""


class BudgetError(QpcError):
    """The budget is malformed, or no allocation fits it."""


class ProfileError(QpcError):
    """A latency profile is malformed, or has no times for what is asked."""


class SolverError(QpcError):
    """The solver ended without a usable answer."""


class QuantizerError(QpcError):
    """A quantizer was asked for a rate, shape or window that it does not support."""


class CheckpointError(QpcError):
    """A checkpoint is missing, cut short, inconsistent, or of an unknown format version."""


class KernelError(QpcError):
    """No kernel supports the given shape, quantizer and device."""


class EvaluationError(QpcError):
    """The text, or the window, leaves nothing to evaluate."""


class ClusterError(QpcError):
    """Work that was spread over other machines was lost with them."""


class UsageError(QpcError):
    """A command was given a path or an option that cannot work."""
