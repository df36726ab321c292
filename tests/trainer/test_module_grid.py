from trainer.module_grid import by_layer, grid_in_words


def test_modules_are_a_table_of_layers_and_kinds() -> None:
    ranks = {
        f"model.layers.{layer}.{kind}": 10 * layer + place
        for layer in (0, 1, 10)
        for place, kind in enumerate(("self_attn.q_proj", "mlp.up_proj"))
        if (layer, kind) != (10, "mlp.up_proj")
    }
    assert grid_in_words(ranks | {"project_in": 7}, "ranks:").splitlines() == [
        "ranks:",
        "layer  up_proj  q_proj",
        "    0        1       0",
        "    1       11      10",
        "   10        -     100",
        "project_in: 7",
    ]


def test_kinds_that_end_alike_keep_their_whole_names() -> None:
    ranks = {"h.0.a.proj": 1, "h.0.b.proj": 2}
    assert grid_in_words(ranks, "ranks:").splitlines()[1] == "layer  a.proj  b.proj"


def test_two_towers_are_told_apart() -> None:
    grid = by_layer({"vision.0.q": 1.0, "text.0.q": 2.0})
    assert grid.cells == {(0, "vision.*.q"): 1.0, (0, "text.*.q"): 2.0}
