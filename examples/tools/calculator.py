"""A tool of one function: `--agent.tools examples.tools.calculator:calculate`, with a model that
calls tools and `--agent.style chat`."""

import ast
import operator

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """
    Computes an arithmetic expression exactly as written.

    Args:
        expression: numbers, + - * / and brackets, as in (2 + 3) * 4
    """
    return f"{_value(ast.parse(expression, mode='eval').body):g}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        result: float = _OPERATORS[type(node.op)](left, right)
        return result
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")
