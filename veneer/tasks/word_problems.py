"""Arithmetic word problems: worked answers to learn from, and the final number to be judged by.

Templates (`veneer.assets.word_problem_templates`) are data: their expressions are read by a small interpreter that knows
arithmetic, comparison and a dozen functions, and nothing else.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadValue
from veneer.tasks.causal_lm import continue_prompts
from veneer.tasks.chat import Chat, _tokens
from veneer.tasks.data import Row, Table
from veneer.tasks.metric import Measured, proportion

if TYPE_CHECKING:
    from torch import nn

REQUEST = "\nSolve it step by step. End with a line '#### ' and the number."
DRAWS = 400
"""Attempts to draw numbers that fit a template's conditions before it is left with fewer problems."""


class WordProblems(Chat):
    """Question and worked answer a row; the answer ends in "#### number".

    Trained like chat, with the loss on the answer. Metrics: loss, perplexity, and the share of right numbers in generated
    answers (accuracy, Wilson interval).
    """

    slug: ClassVar[str] = "word-problems"

    def check(self, table: Table, split: str) -> None:
        super().check(table, split)
        for i, row in enumerate(table.rows):
            if final_number(row[self.options.label or ""]) is None:
                raise BadValue(f"{table.place(i)} ({split}): the answer must end with a line '#### ' and a number.")

    def messages(self, row: Row) -> Any:
        if self.options.text is None:
            return row.get("messages")
        return [
            {"role": "user", "content": f"{row[self.options.text]}{REQUEST}"},
            {"role": "assistant", "content": row[self.options.label or ""]},
        ]

    def generate(self, model: nn.Module, processor: Any, rows: Sequence[Row], batch_size: int) -> Measured:
        prompts = [_tokens(self.messages(row)[:1], processor, ask=True) for row in rows]
        answers = continue_prompts(model, processor, prompts, self.options.max_new_tokens, batch_size)
        wanted = [final_number(row[self.options.label or ""]) for row in rows]
        right = [final_number(answer) == number for answer, number in zip(answers, wanted)]
        return Measured({"accuracy": proportion(sum(right), len(right))}, right)

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        asked = [f"{item}{REQUEST}" if isinstance(item, str) else item for item in inputs]
        found = super().predict(model, processor, asked, batch_size)
        return [{**one, "number": None if (n := final_number(one["text"])) is None else float(n)} for one in found]


def final_number(text: str) -> Fraction | None:
    """The number after "####", else the last number of the text; None if there is none."""
    marked = re.findall(r"####\s*[^\d-]{0,3}(-?[\d,]*\.?\d+)", text)
    numbers = marked or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return Fraction(numbers[-1].replace(",", "")) if numbers else None


# -- problems from templates ------------------------------------------------------------------------------------


def problems(language: str = "eng", each: int = 10, seed: int = 0) -> list[Row]:
    """Up to `each` different problems from every template: rows of question, answer and template number.

    The first of a template is the published one; the others draw their numbers and names anew.
    """
    from veneer.assets import word_problem_templates

    templates, words = word_problem_templates(language)
    rows: list[Row] = []
    for number, template in enumerate(templates):
        pairs = {_tidy(template["question"]): _tidy(template["answer"])}
        chance = random.Random(f"{seed}/{number}")
        for _ in range(each - 1):
            pair = draw(template, words, chance)
            if pair is not None:
                pairs.setdefault(*pair)
        rows.extend({"question": q, "answer": a, "template": str(number)} for q, a in pairs.items())
    return rows


def draw(template: Mapping[str, Any], words: Mapping[str, Any], chance: random.Random) -> tuple[str, str] | None:
    """A fresh question and answer of a template; None if its rules cannot be read or no numbers are found that fit them."""
    question, rules, conditions = _parts(template["question_annotated"])
    try:
        for _ in range(DRAWS):
            values = _drawn(rules, conditions, {**words, "": chance})
            if values is not None:
                return _tidy(_filled(question, values)), _tidy(_filled(template["answer_annotated"], values))
    except (BadValue, ArithmeticError, TypeError, ValueError, IndexError):
        return None
    return None


def _parts(annotated: str) -> tuple[str, list[str], list[str]]:
    """Question, rules ("name = expression") and conditions of an annotated template."""
    question, _, rest = annotated.partition("#init:")
    rest, _, _ = rest.partition("#answer:")
    rules, _, conditions = rest.partition("#conditions:")
    return question.strip(), _items(rules), _items(conditions)


def _items(block: str) -> list[str]:
    return [line.strip()[1:].strip() for line in block.splitlines() if line.strip().startswith("-")]


class _Shown(str):
    """A word or number from a list: shown as it stands, counted with as the number it is."""


def _drawn(rules: Sequence[str], conditions: Sequence[str], values: dict[str, Any]) -> dict[str, Any] | None:
    """The rules' values, or None as soon as one of the conditions fails."""
    waiting = list(conditions)
    for rule in rules:
        names, _, expression = rule.partition("=")
        found = evaluate(expression.strip(), values)
        targets = [n.strip().lstrip("$") for n in names.split(",")]
        values.update(zip(targets, found) if len(targets) > 1 else [(targets[0], found)])
        ready = [c for c in waiting if _names(c) <= values.keys()]
        if not all(evaluate(c, values) for c in ready):
            return None
        waiting = [c for c in waiting if c not in ready]
    return values if all(evaluate(c, values) for c in waiting) else None


@cache
def _names(expression: str) -> frozenset[str]:
    """The variables of an expression."""
    return frozenset(n.id for n in ast.walk(_parsed(expression)) if isinstance(n, ast.Name)) - _FUNCTIONS.keys()


def _filled(text: str, values: Mapping[str, Any]) -> str:
    def shown(mark: re.Match) -> str:
        body = (
            re.sub(r"^(\w+)\s*,.*$", r"\1", mark[1].strip(), flags=re.DOTALL) if re.match(r"\w+\s*,", mark[1].strip()) else mark[1].strip()
        )
        value = values[body] if body in values else evaluate(body, values)
        return value if isinstance(value, str) else _written(_number(value))

    return re.sub(r"\{([^{}]*)\}", shown, text)


def _written(number: int | Fraction) -> str:
    """A whole number or a decimal as such; other fractions as a/b."""
    if number.denominator == 1:
        return str(number.numerator)
    left = number.denominator
    for prime in (2, 5):
        while left % prime == 0:
            left //= prime
    return f"{float(number):.10g}" if left == 1 else f"{number.numerator}/{number.denominator}"


def _tidy(text: str) -> str:
    """Without the calculator marks <<…>>, blank lines and blanks at the ends."""
    lines = (line.strip() for line in re.sub(r"<<.*?>>", "", text).splitlines())
    return "\n".join(line for line in lines if line)


# -- the interpreter --------------------------------------------------------------------------------------------


def evaluate(expression: str, values: Mapping[str, Any]) -> Any:
    """The value of a template expression. Raises `BadValue` for anything but arithmetic and the functions known here."""
    return _value(_parsed(expression), values)


@cache
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError:
        raise BadValue(f"The template expression {expression!r} cannot be read.") from None


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: lambda a, b: Fraction(a) / b,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            if name not in values:
                raise BadValue(f"The template uses {name!r}, which it does not define.")
            return values[name]
        case ast.Constant(value=value) if isinstance(value, str):
            return _Shown(value)
        case ast.Constant(value=value) if isinstance(value, int | float):
            return value if isinstance(value, int) else Fraction(str(value))
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, values) for part in parts]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            power = _number(_value(right, values))
            if abs(power) > 8:
                raise BadValue("A template raises to a power above 8.")
            return _number(_value(left, values)) ** int(power)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, values), _value(right, values)
            if isinstance(a, list) and isinstance(b, list):
                return a + b
            return _OPERATORS[type(op)](_number(a), _number(b))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(_value(operand, values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, values)
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(_value(part, values) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            chain = [_value(n, values) for n in (left, *others)]
            return all(_compared(op, a, b) for op, a, b in zip(ops, chain, chain[1:]))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, values) else orelse, values)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](values, *[_value(arg, values) for arg in args])
    raise BadValue(f"A template expression uses {ast.unparse(node)!r}, which is not arithmetic.")


def _compared(op: ast.cmpop, a: Any, b: Any) -> bool:
    if type(op) not in _OPERATORS:
        raise BadValue("A template compares in a way that is not arithmetic.")
    try:
        return _OPERATORS[type(op)](_number(a), _number(b))
    except (ValueError, TypeError):
        return _OPERATORS[type(op)](a, b)


def _number(value: Any) -> Any:
    """An exact number (int or Fraction), also from a word that is one ("1/2", "0.25", "1,200")."""
    if type(value) is int or type(value) is Fraction:
        return value
    return Fraction(value.replace(",", "")) if isinstance(value, str) else Fraction(value)


def _sample(values: Mapping[str, Any], items: Sequence, count: Any = 1) -> Any:
    found = [_read(item) for item in values[""].sample(list(items), int(count))]
    return found[0] if count == 1 else found


def _read(item: Any) -> Any:
    return (
        [_read(i) for i in item]
        if isinstance(item, list)
        else _Shown(item)
        if isinstance(item, str)
        else item
        if isinstance(item, int)
        else Fraction(item)
    )


def _steps(start: Any, stop: Any, step: Any = 1) -> tuple[Any, Any, int]:
    """First number, step and count of a range whose end is left out."""
    first, last, by = _number(start), _number(stop), _number(step)
    count = -((first - last) // by) if by > 0 else 0
    if not 0 < count < 1_000_000:
        raise BadValue("A template's range is empty or far too long.")
    return first, by, int(count)


def _ranged(values: Mapping[str, Any], *bounds: Any) -> Any:
    first, by, count = _steps(*bounds)
    return first + values[""].randrange(count) * by


def _listed(values: Mapping[str, Any], *bounds: Any) -> list[Any]:
    first, by, count = _steps(*bounds)
    return [first + k * by for k in range(count)]


def _ranged_word(values: Mapping[str, Any], start: Any, stop: Any, step: Any, names: Sequence[str]) -> list[Any]:
    number = _ranged(values, start, stop, step)
    return [_Shown(names[int(number) - 1] if int(number) <= len(names) else number), number]


def _sequence(values: Mapping[str, Any], items: Sequence, count: Any) -> list[Any]:
    start = values[""].randrange(len(items))
    return [_read(items[(start + k) % len(items)]) for k in range(int(count))]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sample": _sample,
    "range": _ranged,
    "arange": _ranged,
    "range_str": _ranged_word,
    "range_list": _listed,
    "sample_sequential": _sequence,
    "is_int": lambda values, x: _number(x).denominator == 1,
    "divides": lambda values, a, b: _number(b) != 0 and _number(a) % _number(b) == 0,
    "int": lambda values, x: int(_number(x)),
    "ensure_int": lambda values, x: int(_number(x)),
    "float": lambda values, x: _number(x),
    "round": lambda values, x, digits=0: round(Fraction(_number(x)), int(digits)),
    "abs": lambda values, x: abs(_number(x)),
    "min": lambda values, *xs: min(_number(x) for x in xs),
    "max": lambda values, *xs: max(_number(x) for x in xs),
    "Fraction": lambda values, a, b=1: Fraction(_number(a)) / _number(b),
    "str": lambda values, x: _Shown(x if isinstance(x, str) else _written(_number(x))),
}
