"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load_chapter


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its exercises."""
    return vars(load_chapter("05_smash"))


def block(*ops: str, banks: str = "4", channels: str = "channels") -> str:
    """An answer to exercise 2 that returns a block of these ops."""
    made = ", ".join(f"Op({op})" for op in ops)
    return f"def unet_block(channels, units):\n    return Block({banks}, {channels}, ({made},))"


def counted(code: str) -> str:
    """An answer to exercise 3 that returns this."""
    return f"def count_simple(space):\n    return {code}"


def chosen(code: str) -> str:
    """An answer to exercise 4 that returns this."""
    return f"def most_overrated(scores, errors):\n    return {code}"


DOWN, BOTTOM, UP = "(0,), (1,), units", "(1,), (2,), units", "(1, 2), (3,), units"
SIZES = "(space.channels // space.unit) * (space.units // space.unit)"
KERNELS = "sum(widest for _, widest in space.kernels)"
GROUPS = "len(space.groups)"
RANKS = "stats.rankdata(errors) - stats.rankdata(scores)"

# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = [
    (1, "answer_1 = 55.0"),
    (1, "answer_1 = [np.int64(55)]"),
    (1, "answer_1 = torch.tensor([55.0], requires_grad=True)"),
    (1, "answer_1 = max(part.stop for part in channel_layout(Space()).values())"),
    (2, block(DOWN, BOTTOM, UP).replace("units):", "units, extra=0):")),
    (2, block("[0], [1], units", "[1], [2], units", "[1, 2], [3], units")),
    (2, block(DOWN, f"{BOTTOM}, (True, True, True, True)", f"{UP}, kernel=5, groups=2")),
    (
        2,
        "def unet_block(channels, units):\n"
        "    ways = [((0,), (1,)), ((1,), (2,)), ((1, 2), (3,))]\n"
        "    return Block(4, channels, [Op(*way, units) for way in ways])",
    ),
    (3, counted(f"float({SIZES} * {KERNELS} * {GROUPS} * 15)")),
    (3, counted(f"torch.tensor({SIZES} * {KERNELS} * {GROUPS} * 15)")),
    (3, counted(f"np.array([{SIZES} * {KERNELS} * {GROUPS} * 15], dtype=np.float32)")),
    (
        3,
        "def count_simple(space):\n"
        "    n, most = space.unit, (space.channels, space.units)\n"
        "    sizes = [range(n, end + 1, n) for end in most]\n"
        "    kernels = [(k, d) for k, widest in space.kernels for d in range(widest)]\n"
        "    patterns = [p for p in itertools.product((0, 1), repeat=4) if any(p)]\n"
        "    return len([*itertools.product(*sizes, kernels, space.groups, patterns)])",
    ),
    (4, chosen(f"np.argmax({RANKS})")),
    (4, chosen(f"float(np.argmax({RANKS}))")),
    (4, chosen(f"[int(np.argmin(-({RANKS})))]")),
    (
        4,
        chosen(
            "max(range(len(scores)), key=lambda k: (errors < errors[k]).sum()"
            " - (scores < scores[k]).sum())"
        ),
    ),
    (
        4,
        "def most_overrated(scores, errors):\n"
        "    by_score, by_error = (torch.tensor(x).argsort().argsort() for x in (scores, errors))\n"
        "    return (by_error - by_score).argmax()",
    ),
    (
        4,
        "def most_overrated(scores, errors):\n"
        "    def places(values):\n"
        "        return [sum(v < value for v in values) for value in values]\n"
        "    scores, errors = scores.tolist(), errors.tolist()\n"
        "    gains = [e - s for s, e in zip(places(scores), places(errors))]\n"
        "    return gains.index(max(gains))",
    ),
]

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = 43", "not yet: too few"),
    (1, "answer_1 = 56", "not yet: too many"),
    (1, "answer_1 = 54.5", "not yet: one whole number"),
    (1, "answer_1 = 'fifty-five'", "not yet: one whole number"),
    (1, "answer_1 = float('nan')", "not yet: one whole number"),
    (1, "answer_1 = float('inf')", "not yet: one whole number"),
    (1, "answer_1 = (55, 55)", "not yet: one whole number"),
    (1, "answer_1 = {'channels': 55}", "not yet: one whole number"),
    (1, "def answer_1():\n    return 55", "not yet: one whole number"),
    (2, "def unet_block(channels, units):\n    return resnet_block(8, 3, 16)", "not yet: 4 banks"),
    (
        2,
        "def unet_block(channels, units):\n"
        "    return Block(4, channels, (Op((1, 2), (3,), units),))",
        "not yet: block 0, op 0: reads bank 1",
    ),
    (2, block(DOWN, BOTTOM), "not yet: 4 banks and 3 ops are asked for, not 4 and 2"),
    (2, block(DOWN, BOTTOM, UP, banks="5"), "not yet: 4 banks and 3 ops are asked for, not 5"),
    (2, block(DOWN, BOTTOM, "(2,), (3,), units"), "not yet: who reads what?"),
    (2, block(DOWN, BOTTOM, "(1, 2), (0,), units"), "not yet: who reads what?"),
    (2, block(DOWN, BOTTOM, "(2, 1), (3,), units"), "not yet: block 0, op 2: reads (2, 1)"),
    (2, block(DOWN, BOTTOM, "(1, 2), 3, units"), "not yet: it raises TypeError"),
    (2, block(DOWN, BOTTOM, UP, channels="8"), "not yet: 8 channels, not 16"),
    (2, block(DOWN, BOTTOM, "(1, 2), (3,), 16"), "not yet: an op of 16 units, not 8"),
    (2, block(DOWN, BOTTOM, UP, channels="float('nan')"), "not yet: "),
    (2, "def unet_block(channels):\n    return None", "not yet: it raises TypeError"),
    (2, "def unet_block(channels, units):\n    return [(0,), (1,)]", "not yet: return a Block"),
    (2, "unet_block = 4", "not yet: it raises TypeError"),
    (3, "def count_simple(space):\n    return 15 * 3 * 2 * 2 - 1", "not yet: too few"),
    (3, "def count_simple(space):\n    return 180", "not yet: too many"),
    (3, counted(f"{SIZES} * {KERNELS} * {GROUPS} * 16"), "not yet: is each of the 16"),
    (3, counted(f"{SIZES} * len(space.kernels) * {GROUPS} * 15"), "not yet: too few"),
    (
        3,
        counted(f"space.channels * space.units * {KERNELS} * {GROUPS} * 15"),
        "not yet: too many",
    ),
    (3, counted("float('nan')"), "not yet: it should return one"),
    (3, counted("'360'.join('ab')"), "not yet: it should return one"),
    (3, counted("10**400"), "not yet: it should return one"),
    (3, "def count_simple(space):\n    raise ValueError", "not yet: it raises ValueError"),
    (3, counted("space.size"), "not yet: it raises AttributeError"),
    (3, counted("[360, 270]"), "not yet: it should return one"),
    (3, "count_simple = 360", "not yet: it raises TypeError"),
    (4, chosen("int(np.argmax(errors))"), "not yet: "),
    (4, chosen("int(np.argmax(errors - scores))"), "not yet: "),
    (4, chosen(f"int(np.argmin({RANKS}))"), "not yet: the most underrated"),
    (4, chosen("0"), "not yet: "),
    (4, chosen(f"int(np.argmax({RANKS})) - 30"), "not yet: it should return one index"),
    (4, chosen("30"), "not yet: it should return one index"),
    (4, chosen("1.5"), "not yet: it should return one index"),
    (4, chosen("float('nan')"), "not yet: it should return one index"),
    (4, chosen("scores"), "not yet: it should return one index"),
    (4, chosen("scores[99]"), "not yet: it raises IndexError"),
    (4, chosen("sorted(scores, errors)"), "not yet: it raises TypeError"),
]
