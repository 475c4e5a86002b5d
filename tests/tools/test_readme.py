"""The README's own example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_readme_example(capsys):
    block = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    names = {}
    exec(compile(block, str(README), "exec"), names)
    assert tuple(names["step"].hidden.shape) == (2, 352, 1024)
    assert names["later"].layout.spans == (((35, 121),),) * 2
    assert "runs" in capsys.readouterr().out
