"""What train_dtml.py says of the scans that it reads, as `tools.check` does."""

import numpy as np
from test_check import change, log_of, volumes


def test_training_tells_of_a_class_that_no_labeled_scan_has(tiny_set, tmp_path):
    for i in range(4):
        label = volumes(tiny_set, f"case{i:02d}")[1]
        change(tiny_set, f"case{i:02d}", label=np.where(label > 0, 3 if i else 1, 0).astype(np.uint8))
    text = (
        "no labeled training case has class 2, so that it cannot be learned. See --classes and the order of the list."
    )
    said = [f"warning: all cases: {text}"]
    assert log_of(tiny_set, tmp_path / "once", "--classes", "3", "--cache", "disk") == said
    change(tiny_set, "case03", spacing=(1.0, 1.0, 2.0))  # alone read anew, so that nothing is known of the others
    assert log_of(tiny_set, tmp_path / "again", "--classes", "3", "--cache", "disk") == []


def test_training_tells_what_it_sees_and_a_clean_set_is_silent(tiny_set, tmp_path, capsys):
    assert log_of(tiny_set, tmp_path / "clean") == []
    image, _ = volumes(tiny_set, "case01")
    change(tiny_set, "case06", image=image)
    change(tiny_set, "case02", label=np.zeros(image.shape, np.uint8))
    change(tiny_set, "case03", spacing=(1.0, 1.0, 3.0))
    change(tiny_set, "case05", image=900 * volumes(tiny_set, "case05")[0])
    (tiny_set / "case09" / "mri_norm2.h5").write_bytes(b"a test case is no business of training")
    capsys.readouterr()
    lines = log_of(tiny_set, tmp_path / "run", "--patch-size", "32", "16", "16")
    assert [next(word for word in ("normalised", "another size", "smaller", "empty", "same image") if word in line)
            for line in lines] == ["normalised", "another size", "smaller", "empty", "same image"]  # fmt: skip
    err = capsys.readouterr().err
    assert all(err.count(line) == 1 for line in lines)
