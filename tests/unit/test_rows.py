"""Rows that methods see: the prompt written out, Arrow's fillers gone, the hash of what is said."""

from swift_cl.training.rows import hash_of_rows, rows_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_system_prompt_is_written_out() -> None:
    own = {"role": "system", "content": "own"}
    rows = rows_of([{"messages": [USER, ASSISTANT]}, {"messages": [own, USER, ASSISTANT]}], "task's")
    assert rows[0]["messages"] == [{"role": "system", "content": "task's"}, USER, ASSISTANT]
    assert rows[1]["messages"] == [own, USER, ASSISTANT]


def test_no_prompt_becomes_an_empty_one() -> None:
    """Replayed in a later stage, the row must not take that stage's prompt."""
    (row,) = rows_of([{"messages": [USER, ASSISTANT]}], None)
    assert row["messages"][0] == {"role": "system", "content": ""}


def test_fillers_of_arrow_are_dropped_at_every_depth() -> None:
    filled = {"messages": [{**USER, "loss": None}, ASSISTANT], "images": None, "id": "1", "n": [{"x": None, "y": 0}]}
    (row,) = rows_of([filled], "s")
    assert row["messages"][1] == USER
    assert row == {"messages": row["messages"], "id": "1", "n": [{"y": 0}]}


def test_the_data_set_is_not_changed() -> None:
    raw = {"messages": [USER, ASSISTANT]}
    rows_of([raw], "s")
    assert raw == {"messages": [USER, ASSISTANT]}


def test_hash_sees_content_and_order() -> None:
    one, two = {"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT, USER]}
    assert hash_of_rows([one, two]) == hash_of_rows([dict(one), dict(two)])
    assert hash_of_rows([one, two]) != hash_of_rows([two, one])
    assert hash_of_rows([one]) != hash_of_rows([one, one])


def test_images_are_names_that_a_file_can_hold() -> None:
    """ms-swift's data sets hold each image as a mapping, which its template does not take without its empty half."""
    images = [{"bytes": None, "path": "/a.png"}, {"bytes": b"\x89P", "path": None}, "b.png"]
    (row,) = rows_of([{"messages": [USER, ASSISTANT], "images": images}], "s")
    assert row["images"] == ["/a.png", "data:image;base64,iVA=", "b.png"]
