"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load_chapter


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to the checks of its exercises."""

    def exact_add(r: str, n: int, q: str) -> None:
        return None

    def cifar_network() -> None:
        return None

    unanswered = {"answer_1": None, "answer_3": None}
    functions = {"exact_add": exact_add, "cifar_network": cifar_network}
    return vars(load_chapter("02_north_select")) | unanswered | functions


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

NETWORK = "GrowingConvNet([8] * 3, [8], 3, 10, 32)"
BY_Q = "Grow(EffectiveRank(0.5), limit=60_000)"

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT = [
    (1, "answer_1 = torch.tensor([9 / 12], dtype=torch.float32)"),
    (1, "answer_1 = np.float64(0.75)"),
    (1, "from fractions import Fraction\nanswer_1 = Fraction(3, 4)"),
    (1, "answer_1 = '0.75'"),
    (
        2,
        "from decimal import Decimal, ROUND_CEILING, getcontext\n"
        "def exact_add(r, n, q):\n"
        "    asked = (Decimal(r) - Decimal(q)) * n\n"
        "    return max(Decimal(0), asked.to_integral_value(ROUND_CEILING))",
    ),
    (
        2,
        "from fractions import Fraction\n"
        "def exact_add(r, n, q):\n"
        "    return np.int64(max(0, math.ceil((Fraction(r) - Fraction(q)) * n)))",
    ),
    (
        2,
        "from fractions import Fraction\n"
        "exact_add = lambda r, n, q: float(\n"
        "    max(Fraction(0), -((Fraction(q) - Fraction(r)) * n // 1)))",
    ),
    (3, "answer_3 = 2.0"),
    (3, "answer_3 = '2'"),
    (3, "answer_3 = torch.tensor(2)"),
    (4, f"cifar_network = lambda: [{NETWORK}, {BY_Q}]"),
    (
        4,
        "def cifar_network():\n"
        "    network = GrowingConvNet((8, 8, 8), (8,), in_channels=3, image_size=32)\n"
        "    return network, Grow(EffectiveRank(q=0.4), limit=6e4)",
    ),
    (4, f"cifar_network = lambda: ({NETWORK}, Grow(EffectiveRank(0.7, 0.2), limit=60_000))"),
]

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = 0.5", "too small: random"),
    (1, "answer_1 = 0.749", "too small: neurons that are orthogonal"),
    (1, "answer_1 = 1.0", "larger than needed"),
    (1, "answer_1 = 9", "not a relative erank"),
    (1, "answer_1 = float('nan')", "not a relative erank"),
    (1, "answer_1 = 'three quarters'", "not a relative erank"),
    (1, "answer_1 = [0.75, 0.75]", "not a relative erank"),
    (1, "answer_1 = object()", "not a relative erank"),
    (2, "exact_add = lambda r, n, q: neurons_to_add(float(r), n, float(q)) + 1", "not yet"),
    (
        2,
        "exact_add = lambda r, n, q: max(0, math.floor((float(r) - float(q)) * n))",
        "not yet",
    ),
    (2, "exact_add = lambda r, n, q: neurons_to_add(float(r), n, float(q))", "not yet: 0 for"),
    (2, "exact_add = lambda r, n, q: 1 / 0", "not yet: it raises ZeroDivisionError"),
    (2, "exact_add = lambda r, n, q: r - q", "not yet: it raises TypeError"),
    (2, "exact_add = lambda r: r", "not yet: it raises TypeError"),
    (2, "exact_add = 7", "not yet: a function is asked for"),
    (2, "exact_add = lambda r, n, q: math.nan", "not yet: nan for"),
    (2, "exact_add = lambda r, n, q: 'many'", "not yet: 'many' for"),
    (3, "answer_3 = 1", "not this one"),
    (3, "answer_3 = 3", "not this one"),
    (3, "answer_3 = 0", "not a layer"),
    (3, "answer_3 = 'conv2'", "not a layer"),
    (3, "answer_3 = (1, 2)", "not a layer"),
    (3, "answer_3 = math.nan", "not a layer"),
    (
        4,
        f"cifar_network = lambda: ({NETWORK}, Grow(EffectiveRank(1.0), limit=60_000))",
        "not yet: nothing has grown",
    ),
    (
        4,
        f"cifar_network = lambda: (GrowingConvNet([8] * 3, [], 3, 10, 32), {BY_Q})",
        "not yet: three convolutional",
    ),
    (
        4,
        f"cifar_network = lambda: (GrowingConvNet([8] * 3, [16], 3, 10, 32), {BY_Q})",
        "not yet: it should start with 8 each",
    ),
    (
        4,
        f"cifar_network = lambda: ({NETWORK}, Grow(EffectiveRank(0.5), limit=50_000))",
        "not yet: the limit",
    ),
    (4, f"cifar_network = lambda: {NETWORK}", "not yet: return the network and the callback"),
    (4, f"cifar_network = lambda: ({BY_Q}, {NETWORK})", "not yet: the first of both"),
    (4, f"cifar_network = lambda: ({NETWORK}, EffectiveRank(0.5))", "not yet: the second of both"),
    (
        4,
        f"cifar_network = lambda: (GrowingConvNet([8] * 3, [8], 1, 10, 28), {BY_Q})",
        "not yet: in training on colour images",
    ),
    (4, "cifar_network = lambda: 1 / 0", "not yet: it raises ZeroDivisionError"),
    (4, "cifar_network = 'a network'", "not yet: a function is asked for"),
]
