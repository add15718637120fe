from ._bundle import make_bundle
from mllama_runtime.bundle import Bundle


def test_a(tmp_path):
    Bundle.open(make_bundle(tmp_path / "b"))
