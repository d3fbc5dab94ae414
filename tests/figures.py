"""What every figure of a report keeps; the notebooks in nbs/report/plots test each of theirs with it."""
import io


def labels(fig) -> list:
    "All texts inside the axes of a figure that has been drawn."
    texts = [t for ax in fig.axes for t in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label)]
    return texts + [t for ax in fig.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels())]


def check_figure(fig, alt: str, *words: str) -> None:
    "A figure draws, its alt is a sentence with these words, no font is below 10 points and no tick is named twice."
    fig.savefig(io.BytesIO(), format="png", dpi=40)
    assert fig.get_suptitle() and "nan" not in fig.get_suptitle().lower().split(), fig.get_suptitle()
    assert alt[0].isupper() and alt.endswith(".") and len(alt.split()) >= 6, alt
    for w in words:
        assert w in alt, (w, alt)
    assert "nan" not in alt.lower().split() and "None" not in alt, alt
    assert min(t.get_fontsize() for t in labels(fig) if t.get_text()) >= 10
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            ticks = [t.get_text() for t in axis.get_ticklabels() if t.get_text()]
            assert len(ticks) == len(set(ticks)), ticks
