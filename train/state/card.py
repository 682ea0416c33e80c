"""The model card of an export: what the model is, what it was trained on, how well, and who can serve it."""

from __future__ import annotations

import math
from pathlib import Path

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.huggingface_engines import engines
from torch_ref.spec.interface import TrainingState
from torch_ref.spec.parameters import count_active_parameters, count_parameters
from torch_ref.spec.storage import read_json

PARITY_BEGIN, PARITY_END = "<!-- parity:begin -->", "<!-- parity:end -->"
VERDICT = Path("parity") / "verdict.json"
"""In a run folder: what `python -m parity_tests.check` found, of which step."""
UNCHECKED = "Not checked. `python -m parity_tests.check FOLDER` does, and puts its verdict here."

FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- deepseek_v3
- mixture-of-experts
- multi-head-latent-attention
---
"""

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""


def model_card(state: TrainingState, run: Path | None) -> str:
    """`README.md` of an export. Of weights alone it says the sizes; what their run left behind (`TrainingState.meta`,
    the verdict in its folder) adds data, losses and parity."""
    config, options = state.model_config, state.meta.get("options", {})
    total, active = count_parameters(config), count_active_parameters(config)
    title = f"# {options['preset']}" if "preset" in options else "# A DeepSeek-V3-style language model"
    sections = [
        f"{title}\n\nA decoder with DeepSeek-V3's latent attention and experts, {total:,} parameters, {active:,} of "
        "them active per token.",
        f"## Use\n\n{USE}\n\n" + "\n".join(f"- {engine}" for engine in engines(config)),
        f"## Sizes\n\n{_sizes(config)}",
        _training(state),
        f"## Parity\n\nWhether these weights are the same model in JAX/Flax, in PyTorch and in `transformers`:\n\n"
        f"{parity_section(_verdict(run, state.step))}",
    ]
    return FRONT_MATTER + "\n" + "\n\n".join(filter(None, sections)) + "\n"


def parity_section(verdict: str) -> str:
    """A verdict between the markers by which it is found and renewed."""
    return f"{PARITY_BEGIN}\n{verdict}\n{PARITY_END}"


def _verdict(run: Path | None, step: int) -> str:
    """What was found about the checkpoint of this step, if it was checked."""
    if run is None or not (run / VERDICT).is_file():
        return UNCHECKED
    verdict = read_json(run / VERDICT)
    return verdict["text"] if verdict.get("step") == step else UNCHECKED


def _sizes(config: ModelConfig) -> str:
    rows = {
        "vocabulary": f"{config.vocab_size:,}",
        "hidden size": config.hidden_size,
        "layers": f"{config.num_layers}, {config.num_moe_layers} of them with experts",
        "heads": f"{config.num_heads}, of {config.num_kv_heads} keys and values",
        "latent, rotary key": f"{config.kv_lora_rank}, {config.qk_rope_head_dim}",
        "experts": f"{config.n_routed_experts} routed ({config.num_experts_per_tok} per token), "
        f"{config.n_shared_experts} shared",
        "context": f"{config.max_position:,} tokens",
    }
    if not config.num_moe_layers:
        rows["experts"] = "none"
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _training(state: TrainingState) -> str:
    """Data, settings and losses, as far as the run told them; empty for weights alone."""
    options, progress = state.meta.get("options", {}), state.meta.get("progress", {})
    facts = []
    if "dataset" in options:
        config = f", {_listed(options['dataset_config'])}" if options.get("dataset_config") else ""
        facts.append(f"data: {_listed(options['dataset'])}{config}; tokenizer {options['tokenizer']}")
        facts.append(
            f"rows of {options['seq_len']:,} tokens, {options['batch_size']} a step; learning rate up to "
            f"{options['learning_rate']:g}; seed {options['seed']}; computed in {options['dtype']}"
        )
    if state.step:
        tokens = f", {progress['tokens_seen']:,} tokens" if progress.get("tokens_seen") else ""
        facts.append(f"{state.step:,} steps{tokens}")
    if progress.get("loss") is not None:
        facts.append(f"loss of the last step: {_loss(progress['loss'])}")
    if progress.get("best_loss") is not None:
        at = f", at step {progress['best_step']:,}" if "best_step" in progress else ""
        # The run took no note of one that was lower by less.
        within = f", to within {options['min_delta']:g}" if options.get("min_delta") else ""
        facts.append(f"lowest loss on held-out text{within}: {_loss(progress['best_loss'])}{at}")
    return "## Training\n\n" + "\n".join(f"- {fact}" for fact in facts) if facts else ""


def _listed(values: str | list[str]) -> str:
    """One value, or all of several."""
    return values if isinstance(values, str) else ", ".join(values)


def _loss(loss: float) -> str:
    return f"{loss:.4f} nats per token (perplexity {math.exp(min(loss, 700.0)):.2f})"
