"""`python -m dpo_jax.report`, and the page that a run leaves by itself."""

from dpo_jax import report
from dpo_jax.page.render import PAGE
from tests.support.run_folders import make_run


def test_the_path_of_the_page_is_all_that_it_prints(tmp_path, capsys):
    folders = [str(make_run(tmp_path / name, steps=5, every=5)) for name in ("a", "b")]
    assert report.main(folders[:1]) == 0
    assert capsys.readouterr().out == f"{folders[0]}/{PAGE}\n"
    output = str(tmp_path / "c.html")
    assert report.main([*folders, "--output", output, "--title", "Two"]) == 0
    assert capsys.readouterr().out == f"{output}\n" and "<title>Two</title>" in (tmp_path / "c.html").read_text()


def test_a_mistake_is_one_line(tmp_path, capsys):
    folder = str(make_run(tmp_path / "a", steps=5, every=5))
    for argv, said in (
        ([], "RUN"),
        ([str(tmp_path)], "holds no run"),
        ([folder, "--output", "x.html"], "--output is of a comparison"),
        ([folder, folder, "--output", str(tmp_path)], "is there and no page of runs"),
    ):
        assert report.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and error.startswith("error: ")
