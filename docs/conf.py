"""How the documentation is built.

python3 -m uv run --group docs sphinx-build -W docs build/docs

Pages are Markdown (MyST). Those that begin with a `jupytext` header are notebooks: their cells run during the build,
and an error in one of them stops it. The reference is written from the code, see `reference.py`.
"""

import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent / "examples"), os.environ.get("PYTHONPATH")]))

# kernels of notebooks take no settings of whoever builds, and do not warn of how they are talked to
KERNEL = Path(tempfile.mkdtemp(prefix="snr_adam_docs"), "profile_default", "ipython_kernel_config.py")
KERNEL.parent.mkdir()
KERNEL.write_text("c = get_config()\nc.IPKernelApp.log_level = 'ERROR'\n")
os.environ["IPYTHONDIR"] = str(KERNEL.parent.parent)

import reference  # noqa: E402

import snr_adam  # noqa: E402

project = "snr_adam"
author = "The snr_adam authors"
copyright = f"2026, {author}"
version = release = snr_adam.__version__
html_title = f"snr_adam {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]  # no formulas in TeX: they need a script from the network
highlight_language = "text"
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove-warn"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
default_role = "py:obj"
toc_object_entries = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "jax": "https://docs.jax.dev/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
}


def reachable(address: str) -> bool:
    """Whether an inventory can be fetched now; without a network the pages have no links into other projects."""
    try:
        with urllib.request.urlopen(f"{address}objects.inv", timeout=3) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


intersphinx_mapping = {name: (address, None) for name, address in INVENTORIES.items() if reachable(address)}

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_theme_options = {
    "github_url": "https://github.com/snr-adam/snr_adam",
    "navbar_align": "left",
    "secondary_sidebar_items": [],  # a printed report needs the room
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}


def setup(app):
    reference.write(HERE / "reference" / "generated")
    app.connect("autodoc-process-docstring", reference.as_rst, priority=400)  # before napoleon, which has 500
