"""`transformers` as the third framework: runs a DeepseekV3 folder and gives back an `Outcome` in our names, for the
modules that both have in the same shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.harness.measure import Outcome
from torch_ref.spec.huggingface import key_of
from torch_ref.spec.interface import IGNORE


class Judge:
    """A folder as `transformers` loads it, in float32."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model, self.device = model.eval().to(device), device

    def run(
        self, inputs: np.ndarray, targets: np.ndarray, ours: Outcome, forced: bool = False
    ) -> tuple[Outcome, Outcome]:
        """The forward pass on these rows, and `ours` (traced), both with what they have in common alone. Experts of a
        token are in the order of their numbers in both, as `transformers` promises no other; `forced`, they are ours.
        """
        import torch

        trace: dict[str, np.ndarray] = {}
        layers: list[np.ndarray] = []
        with torch.no_grad():
            hooks = self._watch(ours, trace, layers, forced)
            try:
                logits = self.model(torch.from_numpy(inputs).long().to(self.device), use_cache=False).logits
            finally:
                for hook in hooks:
                    hook.remove()
        logits = logits.float().cpu().numpy()
        common = {name: value for name, value in ours.trace.items() if name in trace}
        for router in {name.rpartition(".")[0] for name in common if name.endswith(".chosen")}:
            for outcome in (trace, common):
                order = outcome[f"{router}.chosen"].argsort(axis=1)
                for part in ("chosen", "weights"):
                    outcome[f"{router}.{part}"] = np.take_along_axis(outcome[f"{router}.{part}"], order, axis=1)
        theirs = replace(
            ours, trace=trace, layers=np.stack(layers), logits=logits, loss=mean_loss(logits, targets), gradients={}
        )
        return theirs, replace(ours, trace=common)

    def _watch(self, ours: Outcome, trace: dict, layers: list, forced: bool) -> list[Any]:
        """Hooks that record every module with a counterpart in our trace."""
        modules = dict(self.model.named_modules())
        names = {name: name for name in ours.trace}
        names |= {name.removesuffix(".out"): name for name in ours.trace if name.endswith(".out")}
        names |= {name.removesuffix(".0"): name for name in ours.trace if name.count(".") == 2 and name.endswith(".0")}

        def record(name: str) -> Any:
            def hook(module: Any, args: tuple, output: Any) -> None:
                value = (output[0] if isinstance(output, tuple) else output).float().cpu().numpy()
                if value.size == ours.trace[name].size:
                    trace[name] = value.reshape(ours.trace[name].shape)

            return hook

        hooks = [
            modules[key_of(path)].register_forward_hook(record(name))
            for path, name in names.items()
            if key_of(path) in modules and not path.endswith(".router")
        ]
        for index in range(len(ours.layers)):
            block = modules[f"model.layers.{index}"]
            keep = self._keep_layer(layers)
            hooks.append(block.register_forward_hook(keep))
        routers = [name.removesuffix(".scores") for name in ours.trace if name.endswith("router.scores")]
        for router in routers:
            route = self._route(router, trace, ours.trace[f"{router}.chosen"] if forced else None)
            gate, mlp = modules[key_of(router)], modules[key_of(router).rpartition(".")[0]]
            if hasattr(mlp, "route_tokens_to_experts"):
                hooks.append(mlp.experts.register_forward_pre_hook(partial(self._before_experts, route, mlp)))
            else:
                hooks.append(gate.register_forward_hook(partial(self._after_gate, route)))
        return hooks

    @staticmethod
    def _keep_layer(layers: list) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> None:
            layers.append((output[0] if isinstance(output, tuple) else output).float().cpu().numpy())

        return hook

    @staticmethod
    def _route(name: str, trace: dict, forced: np.ndarray | None) -> Callable:
        """What records a router: it takes and returns which experts were chosen, and their weights. With `forced`
        tokens go to these experts."""
        import torch

        def route(gate: Any, scaling: float, hidden: Any, chosen: Any, weights: Any) -> tuple[Any, Any]:
            hidden = hidden.reshape(-1, gate.weight.shape[1]).float()
            scores = torch.nn.functional.linear(hidden, gate.weight.float()).sigmoid()
            if forced is not None:
                chosen = torch.as_tensor(forced, device=scores.device).to(chosen.dtype)
                of_chosen = scores.gather(1, chosen.long())
                weights = (of_chosen / of_chosen.sum(1, keepdim=True) * scaling).to(weights.dtype)
            trace[f"{name}.scores"] = scores.cpu().numpy()
            trace[f"{name}.weights"] = weights.float().cpu().numpy()
            trace[f"{name}.chosen"] = chosen.cpu().numpy()
            return chosen, weights

        return route

    @staticmethod
    def _after_gate(route: Callable, gate: Any, args: tuple, output: tuple) -> tuple:
        """A hook for gates that choose: they return (indices, weights) in version 4, (logits, weights, indices) in
        later ones of version 5."""
        place = next(index for index, part in enumerate(output) if not part.is_floating_point())
        changed = list(output)
        changed[place], changed[1] = route(gate, gate.routed_scaling_factor, args[0], output[place], output[1])
        return tuple(changed)

    @staticmethod
    def _before_experts(route: Callable, mlp: Any, experts: Any, args: tuple) -> tuple:
        """A hook for the first ones of version 5, where the gate gives logits and the layer around it chooses."""
        hidden, chosen, weights = args
        return hidden, *route(mlp.gate, mlp.routed_scaling_factor, hidden, chosen, weights)

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        """The most likely tokens after a prompt, with its cache."""
        import torch

        ids = torch.tensor([prompt], device=self.device)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
        with torch.no_grad():
            new_ids = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return new_ids[0, len(prompt) :].tolist()


def mean_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean next-token loss of the scored targets, nats, in float64."""
    scored = targets != IGNORE
    logits = logits[scored].astype(np.float64)
    highest = logits.max(-1)
    normaliser = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
    return float((normaliser - np.take_along_axis(logits, targets[scored][:, None], 1)[:, 0]).mean())
