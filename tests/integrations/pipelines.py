"""The pipelines of diffusers, importable without transformers: text goes in as embeddings, so the names that they
import from there are stand-ins where it is not installed."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


@contextlib.contextmanager
def _transformers():
    if importlib.util.find_spec("transformers") is not None:
        yield
        return
    from diffusers.utils import import_utils

    names = ("transformers", "transformers.utils", "tokenizers")
    sys.modules.update({name: _StandIn(name) for name in names})
    import_utils._transformers_available, import_utils._transformers_version = True, "4.57.0"
    try:
        importlib.reload(sys.modules["diffusers.loaders"])  # it decides at import which loaders there are
        yield
    finally:
        import_utils._transformers_available, import_utils._transformers_version = False, "N/A"
        for name in names:
            del sys.modules[name]


_PATHS = {
    "FluxPipeline": "flux.pipeline_flux",
    "StableDiffusion3Pipeline": "stable_diffusion_3.pipeline_stable_diffusion_3",
    "WanPipeline": "wan.pipeline_wan",
    "WanVideoToVideoPipeline": "wan.pipeline_wan_video2video",
    "AnyFlowPipeline": "anyflow.pipeline_anyflow",
}


@functools.lru_cache
def _modules():
    with _transformers():
        return {name: importlib.import_module(f"diffusers.pipelines.{path}") for name, path in _PATHS.items()}


def load(name):
    """A pipeline's class."""
    return getattr(_modules()[name], name)
