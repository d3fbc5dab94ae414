"Federated and long-tailed learning with generated features; what a script needs, imported when it is first used."
__version__ = "0.1.0"

_NAMES = {
    "open": "fedgal.pipeline.opened:open_experiment",
    "run": "fedgal.pipeline.run:run",
    "load_model": "fedgal.pipeline.export:load_model",
    "load_dataset": "fedgal.data.datasets:load_dataset",
    "make_split": "fedgal.data.split:make_split",
    "train": "fedgal.pipeline.script:train",
    "class_statistics": "fedgal.pipeline.script:class_statistics",
    "fit_generator": "fedgal.pipeline.script:fit_generator",
    "apply_arm": "fedgal.pipeline.script:apply_arm",
    "evaluate": "fedgal.evaluation.metrics:evaluate",
    "build_model": "fedgal.models.networks:build_model",
    "stream": "fedgal.core.random:stream",
    "FedgalError": "fedgal.core.errors:FedgalError",
}


def __getattr__(name):
    from importlib import import_module

    if name not in _NAMES:
        raise AttributeError(f"module 'fedgal' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__():
    return sorted({*globals(), *_NAMES})
