"""rooflm: roofline models of LLM inference, and the techniques of the book at small scale.

`rooflm.roofline` is theory and needs the standard library only; `rooflm.lab` is practice and
needs torch; `rooflm.show` is presentation and needs matplotlib.
"""

from rooflm.roofline import __version__
from rooflm.roofline.analysis import Calibration, Report, Row, analyze
from rooflm.roofline.config import load_model, model_names
from rooflm.roofline.facts import survey_figure, survey_table1, survey_value
from rooflm.roofline.formats import Format, Precision, load_format
from rooflm.roofline.generation import Generation, generation
from rooflm.roofline.hardware import Hardware, hardware_names, load_hardware
from rooflm.roofline.memory import Memory, memory
from rooflm.roofline.model import MLP, Attention, Block, ForwardPass, Model

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Calibration",
    "Format",
    "ForwardPass",
    "Generation",
    "Hardware",
    "Memory",
    "Model",
    "Precision",
    "Report",
    "Row",
    "__version__",
    "analyze",
    "generation",
    "hardware_names",
    "load_format",
    "load_hardware",
    "load_model",
    "memory",
    "model_names",
    "survey_figure",
    "survey_table1",
    "survey_value",
]
