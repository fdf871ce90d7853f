"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load, load_chapter, read_results
from jahs_utils.networks import ConvNet


def names() -> dict[str, Any]:
    chapter = load_chapter("00_training")
    recorded = chapter.label(read_results("00_training", "joint_grid", "standard"))
    held_out = load("digits", device="cpu").hold_out(300)
    small = {"ConvNet": lambda channels: ConvNet(channels, image_size=8)}
    return vars(chapter) | {"recorded": recorded, "held_out": held_out} | small


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {1: "answer_1 = 126_154"}

BEST = """
def best_under(rows, limit):
    allowed = rows[rows["parameters"] <= limit]
    best = allowed.groupby(["lr", "width", "depth"])["{column}"].{mean}().idxmax()
    return {form}
"""
REPEATED = """
def repeated(scores, start, order):
    point = start
    for _ in range({rounds}):
        point = coordinate_search(scores, point, order)
    return {form}
"""
WARM_UP = """
def warm_up(fraction, epoch):
    factor = min(fraction / {rise}, (1 - fraction) / {fall})
    return {form}
"""


def best(form: str = "best", column: str = "accuracy", mean: str = "mean") -> str:
    return BEST.format(form=form, column=column, mean=mean)


def rounds(form: str = "point", count: int = 20) -> str:
    return REPEATED.format(form=form, rounds=count)


def rising(form: str = "factor", rise: float = 0.2, fall: float = 0.8) -> str:
    return WARM_UP.format(form=form, rise=rise, fall=fall)


# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = [
    (1, "answer_1 = 126_154.0"),
    (1, "answer_1 = np.float64(126_154)"),
    (1, "answer_1 = torch.tensor([126_154], dtype=torch.float32)"),
    (1, "answer_1 = (126_154,)"),
    (2, best("list(best)")),
    (2, best("np.array(best, dtype=np.float32)")),
    (2, best("torch.tensor(best, dtype=torch.float64)")),
    (2, best("pd.Series(best, index=AXES)")),
    (3, rounds()),
    (3, rounds("pd.Series(point)")),
    (3, rounds("{axis: np.float32(value) for axis, value in point.items()}")),
    (3, rounds("{axis: torch.tensor(value) for axis, value in point.items()}")),
    (4, rising()),
    (4, rising("np.float32(factor)")),
    (4, rising("torch.tensor([factor], requires_grad=True)")),
    (4, rising("[factor]")),
]

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = 126_153", "not yet: which layers have a bias"),
    (1, "answer_1 = 126_154 - 128", "not yet: which layers have a bias"),
    (1, "answer_1 = 576", "not yet: which term"),
    (1, "answer_1 = 'many'", "not yet: one finite number"),
    (1, "answer_1 = float('nan')", "not yet: one finite number"),
    (1, "answer_1 = [576, 128, 125_450]", "not yet: one finite number"),
    (1, "answer_1 = {}", "not yet: one finite number"),
    (2, "def best_under(rows, limit):\n    return (1.0, 8, 1)", "not yet: "),
    (
        2,
        "def best_under(rows, limit):\n    return (0.03, 32, 4)",
        "not yet: (0.03, 32, 4) has more",
    ),
    (2, "def best_under(rows, limit):\n    return (0.5, 8, 1)", "not yet: [0.5, 8.0, 1.0] is not"),
    (2, "def best_under(rows, limit):\n    return rows", "not yet: a tuple"),
    (2, "def best_under(rows, limit):\n    return 0.1, 8", "not yet: a tuple"),
    (2, "def best_under(rows, limit):\n    return 0.1, 8, float('nan')", "not yet: a tuple"),
    (2, "def best_under(rows):\n    return (0.1, 8, 1)", "not yet: it raises TypeError"),
    (2, "best_under = (0.1, 8, 1)", "not yet: this should be a function"),
    (2, best(mean="std"), "not yet: one is better"),
    (2, best(column="train_loss"), "not yet: one is better"),
    (3, "def repeated(scores, start, order):\n    return start", "not yet: from"),
    (3, rounds(count=1), "not yet: from"),
    (
        3,
        "def repeated(scores, start, order):\n    return dict(zip(AXES, scores.idxmax()))",
        "not yet: from",
    ),
    (3, rounds("tuple(point.values())"), "not yet: a point is a dict"),
    (3, rounds("point | {'lr': None}"), "not yet: a point is a dict"),
    (3, rounds("scores"), "not yet: a point is a dict"),
    (3, rounds("point['rate']"), "not yet: it raises KeyError"),
    (3, "repeated = {'lr': 0.1}", "not yet: this should be a function"),
    (4, "def warm_up(fraction, epoch):\n    return 1 - fraction", "not yet: look again"),
    (4, rising(rise=0.1, fall=0.9), "not yet: look again"),
    (4, rising("factor ** 2"), "not yet: look again"),
    (4, rising("float('nan')"), "not yet: one finite factor"),
    (4, rising("[factor, epoch]"), "not yet: one finite factor"),
    (4, rising("1 / fraction"), "not yet: it raises ZeroDivisionError"),
    (4, rising("str"), "not yet: one finite factor"),
    (4, "def warm_up(fraction):\n    return fraction", "not yet: it raises TypeError"),
    (4, "warm_up = 0.5", "not yet: this should be a function"),
]
