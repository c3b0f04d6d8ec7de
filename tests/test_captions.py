"""Pictures with titles, legends and notes: every text is there, none is cut, the panels' pixels are untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter_fast import captions
from segmenter_fast.captions import RANDOM, captioned, legend_of, percent
from segmenter_fast.inference.records import read_record
from segmenter_fast.visualize import side_by_side
from support.predict import call, photo

PAPER, INK, ALARM = (250, 250, 248), (32, 32, 38), (190, 20, 20)
COLORS = ((255, 0, 0), (0, 200, 0), (0, 0, 255))


def holds(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((picture == color).all(-1).any())


def test_a_legend_names_the_classes_that_occur_the_largest_first() -> None:
    counts = np.array([1, 0, 999])
    assert legend_of(counts, COLORS, ("a", "b", "c")) == [(COLORS[2], "c, 100 %"), (COLORS[0], "a, <1 %")]
    assert legend_of(counts, COLORS, ("a", "b", "c"), shares=False) == [(COLORS[2], "c"), (COLORS[0], "a")]
    many = legend_of(np.arange(30), COLORS * 10, [str(place) for place in range(30)], shares=False)
    assert many[0] == (COLORS[2], "29")
    assert many[24:] == [(None, "and 5 more")]
    assert [percent(share) for share in (0.004, 0.005, 0.434)] == ["<1 %", "0 %", "43 %"]


@pytest.mark.parametrize("width", [10, 300, 3000])
def test_nothing_is_cut(width: int) -> None:
    panel = Image.fromarray(np.full((20, width, 3), 7, np.uint8))
    legend = [(COLORS[place % 3], f"a class with a rather long name {place}") for place in range(9)]
    picture = np.asarray(captioned([[panel, panel]], legend=legend, note=RANDOM))
    assert (picture[:20, :width] == 7).all()
    assert all(holds(picture, color) for color in (*COLORS, ALARM, INK))
    assert (picture[:, -3:][20:] == PAPER).all()
    assert (picture[-2:] == PAPER).all()
    swatches = np.asarray(captioned([[panel]], legend=legend[:1]))[20:]
    assert holds(swatches, COLORS[0])
    assert not holds(swatches, COLORS[1])


def test_titles_stand_above_their_columns() -> None:
    panel = Image.new("RGB", (100, 20), COLORS[0])
    picture = np.asarray(captioned([[panel, panel], [panel, panel]], ("", "a title that is much wider than its panel")))
    assert picture.shape[0] == 21 + 2 * 26
    assert (picture[:21, :100] == PAPER).all()
    assert (picture[:21, 106:206] < 100).any()
    assert (picture[:21, 206:] == PAPER).all()  # shortened
    for top in (21, 47):
        assert (picture[top : top + 20, :100] == COLORS[0]).all()


def test_other_letters_have_another_font(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    panel = Image.new("RGB", (100, 20))
    first, second = (np.asarray(captioned([[panel]], legend=[(None, text)])) for text in ("größe", "gräße"))
    assert not np.array_equal(first, second)  # boxes would be alike
    monkeypatch.setattr(captions, "_installed", tuple)
    assert captioned([[panel]], legend=[(None, "größe")]).size[0] == 256


def test_names_without_letters_in_any_font_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts/ttf"
    names, counts = ("道路", "größe", "sky", "\N{GREEK SMALL LETTER PHI}"), np.array([3, 4, 5, 0])
    monkeypatch.setattr(captions, "_installed", lambda: (str(folder / "DejaVuSans.ttf"),))
    given = legend_of(counts, (*COLORS, COLORS[0]), names, shares=False)
    told = "no installed font has the letters of the other names"
    assert given == [(COLORS[2], "sky"), (COLORS[1], "größe"), (COLORS[0], "class 0"), (None, told)]
    whole = legend_of(counts, (*COLORS, COLORS[0]), names, shares=False, drawn=False)  # a browser has its own fonts
    assert whole == [(COLORS[2], "sky"), (COLORS[1], "größe"), (COLORS[0], "道路")]
    few, most = str(folder / "cmmi10.ttf"), str(folder / "DejaVuSans.ttf")
    for order in ((few, most), (most, few)):
        monkeypatch.setattr(captions, "_installed", lambda order=order: order)
        assert captions._font(14, names[3] + "ö").path == most
    assert captions._font(14, "plain").path != most


def test_samples_show_image_labels_and_prediction() -> None:
    image, target = np.full((6, 8, 3), 100, np.uint8), np.zeros((6, 8), np.uint8)
    target[:, 4:] = 255
    picture = np.asarray(side_by_side(image, target, np.ones((6, 8), np.uint8), COLORS, ("sky", "sea", "sand")))
    panels = [picture[21:165, left : left + 192] for left in (0, 198, 396)]  # enlarged 24 times
    assert (panels[0] == 100).all()
    assert (abs(panels[1][:, :96].astype(int) - (193, 40, 40)) <= 1).all()
    assert (panels[1][:, 96:] == 100).all()  # ignored
    assert (abs(panels[2].astype(int) - (40, 160, 40)) <= 1).all()
    below = picture[165:]
    assert (holds(below, COLORS[0]), holds(below, COLORS[1]), holds(below, COLORS[2])) == (True, True, False)
    assert (picture[:21] < 100).any()
    with pytest.raises(ValueError, match=r"got \(6, 8, 3\), \(6, 8\) and \(5, 8\)"):
        side_by_side(image, target, np.ones((5, 8), np.uint8), COLORS, ("a", "b", "c"))


def test_overlays_of_random_weights_are_marked(tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png", 32, 40)
    done = call("predict", source, "--model", "seg_m_mask_8", "--out", tmp_path / "out", "--device", "cpu")
    assert "1 written" in done.output, done.output
    with Image.open(tmp_path / "out/overlays/x.png") as image:
        assert holds(np.asarray(image), ALARM)
    assert read_record(tmp_path / "out/overlays/x.png")[1]
