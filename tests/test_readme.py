"README.md is what `make readme` makes of nbs/index.ipynb."
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_is_made_of_the_index(tmp_path):
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "markdown", ROOT / "nbs/index.ipynb",
                    "--output-dir", tmp_path, "--output", "README", "--TagRemovePreprocessor.enabled=True",
                    "--TagRemovePreprocessor.remove_input_tags", "hide_input"], check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run: make readme"
