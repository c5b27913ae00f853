"""Whatever a user passes as calibration data, as batches of model inputs."""

from hf_lowbit.calibration.data.prepare import prepare_data
from hf_lowbit.calibration.data.result import CalibrationData, DataError

__all__ = ["CalibrationData", "DataError", "prepare_data"]
