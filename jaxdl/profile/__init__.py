"""Where a step's time goes: a trace, a table by kind, and the largest operations with what limits each."""

from jaxdl.profile.peaks import Peaks, peaks_of
from jaxdl.profile.recording import profile_step
from jaxdl.profile.result import OperationRow, StepProfile
from jaxdl.profile.trace import ProfileError

__all__ = ["OperationRow", "Peaks", "ProfileError", "StepProfile", "peaks_of", "profile_step"]
