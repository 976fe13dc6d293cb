"""Whether gateways will be able to read the text side of every planned checkpoint."""

from __future__ import annotations

from cluster.base.errors import ConfigError, CorruptWeightsError
from cluster.base.plan import ClusterPlan
from cluster.base.spec import ClusterSpec
from replicas.text.chat_template import ChatTemplate
from replicas.text.generation_defaults import GenerationDefaults
from replicas.text.tokenizer import Tokenizer


def check_texts(plan: ClusterPlan, spec: ClusterSpec) -> None:
    """Read each checkpoint's tokenizer, template and defaults once, as a gateway does at its start.

    Args:
        spec: what the plan was made of.

    Raises:
        ConfigError: one of them is damaged; `param` names the entry.
    """
    checked: set[str] = set()
    for index, (model, entry) in enumerate(zip(plan.models, spec.models, strict=True)):
        if model.path in checked:
            continue
        checked.add(model.path)
        try:
            Tokenizer.from_directory(model.path)
            ChatTemplate.from_directory(model.path)
            GenerationDefaults.from_directory(model.path)
        except (ConfigError, CorruptWeightsError) as error:
            key = "path" if entry.repo is None else "repo"
            raise ConfigError(error.cause, error.remedy, param=f"models[{index}].{key}") from error
