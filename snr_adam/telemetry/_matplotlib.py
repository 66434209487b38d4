"""What `plots` draws with, or a sentence that says what to install."""

try:
    from matplotlib import colormaps as colormaps
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import LogNorm as LogNorm
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine as ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter as FuncFormatter
    from matplotlib.ticker import MaxNLocator as MaxNLocator
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ModuleNotFoundError(
        "snr_adam.telemetry.plots draws with matplotlib, which is not installed: pip install 'snr_adam[plots]'",
        name=error.name,
    ) from error
