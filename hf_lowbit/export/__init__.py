"""Export of quantized models to formats that other libraries read."""

from hf_lowbit.export.api import Exported, export_model
from hf_lowbit.export.scheme import ExportError

__all__ = ["ExportError", "Exported", "export_model"]
