"""What every optimizer of the package shares: groups, state, masks, counting, checkpoints."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import state_dtype
from ..regularizers import Regularizer
from . import _checkpoint, _masks
from ._checks import check_changed_options, check_options, check_params, warn_of_misspelt
from ._plan import Amp, Bucket, GroupPlan, counter_values, pointers, slots_of
from ._rule import COUNTERS, Rule
from ._shards import (
    found_inf_anywhere,
    initial_values,
    is_sharded,
    local,
    local_grads,
    mask_as,
    on_all_ranks,
)
from ._traced import traced_step

# Without a Python call per tensor.
_layout, _dtype = operator.attrgetter("layout"), operator.attrgetter("dtype")


class SparseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: one step is rule, prox and mask in one pass over memory.

    A subclass says which rule serves a group (`_rule`) and checks its own hyper-parameters (`_check_group`).
    Parameters without a gradient are skipped: neither their state nor their sparsity changes.

    Change state tensors in place, as in ``optimizer.state[p]["dual"].copy_(other)``. Kernels hold their addresses:
    another tensor put in their place by hand is seen for sure only after `load_state_dict` or `set_mask`.
    """

    _captured: list[GroupPlan]  # plans that a CUDA graph may hold
    joint = False  # whether all tensors of a group may share one prox (`Regularizer.prox_together`)
    dense_params = False  # whether the sparse points lie beside the parameters: averages of them, or twins

    # torch.amp.GradScaler then leaves unscaling and the skip on overflow to `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        maximize: bool,
        fused: bool | None,
        count_nonzeros: bool,
        check_finite: bool,
        capturable: bool,
    ) -> None:
        flags = dict(maximize=maximize, fused=fused, count_nonzeros=count_nonzeros, check_finite=check_finite)
        flags["capturable"] = capturable
        self._plans: dict[int, tuple[Any, GroupPlan]] = {}
        options = {**defaults, **flags, "params": []}
        self._check(options)
        del options["params"]
        super().__init__(params, options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _check_traced(self, group: dict[str, Any]) -> None:
        """Refuse what a compiled step cannot do."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its missing options come from the constructor.

        Raises:
            ValueError, TypeError: an option out of its range, or a parameter that cannot be regularized so.

        Warns:
            UserWarning: an unknown option that looks like a misspelt one. Others stay, as in torch: other libraries
                keep their own in a group.
        """
        if isinstance(param_group, dict):  # torch refuses others
            warn_of_misspelt(self, param_group)
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[before])
        except Exception:
            del self.param_groups[before:]
            raise
        self._forget_plans()

    def _check(self, group: dict[str, Any]) -> None:
        check_options(self, group)
        check_params(self, group)

    def _describe(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        if names:
            return f"parameter {names[index]!r}"
        return f"parameter {index} of shape {tuple(group['params'][index].shape)}"

    def _describe_param(self, param: Tensor) -> str:
        """`_describe` of one of this optimizer's parameters; empty for any other."""
        for group in self.param_groups:
            for index, known in enumerate(group["params"]):
                if known is param:
                    return self._describe(group, index)
        return ""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if any.

        Under `torch.amp.GradScaler` gradients are unscaled in the same pass (`.grad` itself stays scaled, and may be
        fp16), and a step with an overflow changes nothing at all, the step count included.

        Raises:
            RuntimeError: a sparse gradient, or `fused=True` for a tensor that kernels do not serve.
            FloatingPointError: with `check_finite`, a gradient with NaN or Inf.
            All are raised before any parameter changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            traced_step(self)
            return loss
        try:
            self._step_outside_compile()
        except Exception:
            for name in ("found_inf", "grad_scale"):  # GradScaler takes them away after a success only
                vars(self).pop(name, None)
            raise
        return loss

    @torch._disable_dynamo
    def _step_outside_compile(self) -> None:
        """Where torch.compile gives up on `step`, it tries its parts, and inside it DTensors look like tensors."""
        self._step()

    def _step(self) -> bool:
        """Whether anything was stepped, as far as the host knows."""
        capturing = is_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(f"{type(self).__name__}: to capture a step in a CUDA graph, set capturable=True")
        if not self.state and not capturing and self._only_initialises():
            self._init_group()
            return False
        # GradScaler sets both around its call; grad_scale is None after an explicit unscale_.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        capturable = any(group["capturable"] for group in self.param_groups)
        if found_inf is not None and (self._sharded or (found_inf.device.type == "cpu" and not capturable)):
            skip = bool(found_inf)
            if found_inf_anywhere(skip, self._params()) if self._sharded else skip:
                return False
            found_inf = None
        ready = self._ready()
        if len(ready) > 1 or not all(plan.checks_first() for plan, _, _ in ready):
            if any(set(map(_layout, grads)) != {torch.strided} for _, _, grads in ready):
                self._refuse_sparse()
            if sum(len(plan.buckets) for plan, _, _ in ready) > 1:
                self._check_against_params(ready)
        if self._sharded:
            from . import _collective

            places = _collective.places(self)
        for plan, group, grads in ready:
            try:
                plan.run(group, grads, Amp(-1.0 if group["maximize"] else 1.0, grad_scale, found_inf))
            except NotImplementedError:  # torch has no op for such tensors
                self._refuse_sparse()
                raise
        if self._sharded:
            _collective.finish([plan for plan, _, _ in ready], places)
        if capturing:  # the graph reads their memory for as long as it lives
            self._captured += [plan for plan, _, _ in ready]
        return bool(ready)

    def _only_initialises(self) -> bool:
        """Whether this first step has lr = 0 and zero gradients: torch.distributed.checkpoint makes one to create the
        state that it then loads. Parameters stay as they are; prox(delta * dual) would round them."""
        for group in self.param_groups:
            check_options(self, group)
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = [local(p.grad) for p in self._params()]
        zero = all(g is None or (g.layout is torch.strided and not g.any()) for g in grads)
        return on_all_ranks([zero], self._params())[0] if self._sharded else zero

    def _ready(self) -> list[tuple[GroupPlan, dict[str, Any], list[Tensor]]]:
        """Plans and gradients of all groups, with everything checked that can fail."""
        if self._sharded or any(group["check_finite"] for group in self.param_groups):
            self._refuse_sparse()
        ready = []
        for number, group in enumerate(self.param_groups):
            params = group["params"]
            grads = [grad for p in params if (grad := p.grad) is not None]
            if not grads:
                continue
            if len(grads) == len(params):
                active: Any = range(len(params))
            else:
                active = tuple(i for i, p in enumerate(params) if p.grad is not None)
            check_changed_options(self, number, group)
            if group["check_finite"]:
                self._check_finite(group, active, grads)
            if self._sharded:
                grads = local_grads([params[i] for i in active], grads)
            ready.append((self._plan(number, group, active), group, grads))
        return ready

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients: {self._describe(group, index)}; "
                        "use sparse=False in its embedding, or another optimizer for it"
                    ) from None  # torch's own says less at great length

    def _check_finite(self, group: dict[str, Any], active: Any, grads: list[Tensor]) -> None:
        finite = [bool(torch.isfinite(local(grad)).all()) for grad in grads]
        if self._sharded:
            finite = on_all_ranks(finite, group["params"])
        if not all(finite):
            name = self._describe(group, active[finite.index(False)])
            raise FloatingPointError(f"the gradient of {name} has NaN or Inf; nothing was changed")

    def _check_against_params(self, ready: list[tuple[GroupPlan, dict[str, Any], list[Tensor]]]) -> None:
        """torch lets nobody assign a gradient of another shape: a plan's first step looks at shapes, ops always do."""
        for plan, _, grads in ready:
            for bucket in plan.buckets:
                own = bucket.of(grads)
                if plan.fits and set(map(_dtype, own)) == {bucket.dtype}:
                    continue
                for param, grad in zip(bucket.params, own):
                    if (grad.dtype, grad.shape) != (param.dtype, param.shape):
                        raise RuntimeError(
                            f"{type(self).__name__}: a parameter has dtype {param.dtype} and shape "
                            f"{tuple(param.shape)}, its gradient {grad.dtype} and {tuple(grad.shape)}; they must agree"
                        )
            plan.fits = True

    def _plan(self, number: int, group: dict[str, Any], active: Any) -> GroupPlan:
        """The group's plan; built anew when anything but gradients and scalars changed."""
        reg, params = group["reg"], group["params"]
        kind = (type(reg), *(getattr(reg, name, None) for name in ("groups", "weight", "k", "scope")))
        key = (active, self._rule(group).name, kind, group["fused"], group["capturable"])
        stepped = params if len(active) == len(params) else [params[i] for i in active]
        known, where = self._plans.get(number), pointers(stepped, self._sharded)
        if known is not None and known[0] == key and known[1].pointers == where and known[1].is_current(self.state):
            return known[1]
        if is_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: parameters, gradients or options changed since the last step, which cannot be "
                "captured in a CUDA graph: take a step with them outside of it first"
            )
        self._check(group)
        self._refuse_sparse()
        plan = GroupPlan(self, group, active)
        self._plans[number] = (key, plan)
        return plan

    def _init_state(self, param: Tensor, group: dict[str, Any], rule: Rule) -> dict[str, Any]:
        """The parameter's state, with what the rule needs and is not there yet."""
        state: dict[str, Any] = self.state[param]
        for name in ("step", *rule.counters):
            state.setdefault(name, torch.tensor(0.0, dtype=torch.float64))  # fp32 stops counting at 2 ** 24
        mask, dtype, slots = state.get("mask"), state_dtype(param), slots_of(rule, param)
        if "master" not in slots:
            state.pop("master", None)  # the parameter became its own master: model.float()
        start = initial_values(rule, [slot for slot in slots if slot not in state], param, group, dtype)
        for slot in slots:
            known, wanted = state.get(slot), (dtype, param.shape, _strides(param))
            if known is not None and (known.dtype, known.shape, known.stride()) == wanted:
                continue
            # The same state in another dtype or memory layout keeps its values.
            value = local(state[slot]) if slot in state else start[slot]
            state[slot] = torch.zeros_like(param, dtype=dtype)
            if value is not None:
                local(state[slot]).copy_(value)
            if mask is not None:
                local(state[slot]).masked_fill_(~_masks.unpack(local(mask), param), 0)
        return state

    def _init_group(self) -> None:
        """State of all parameters with a gradient, and the checks of a step. torch.compile runs a method of this name
        while it traces a step, not as part of it; once, or it would lose the counters of the first groups."""
        for group in self.param_groups:
            self._check(group)
            rule = self._rule(group)
            shared: dict[Any, Tensor] = {}
            for param in group["params"]:
                if param.grad is not None:
                    state = self._init_state(param, group, rule)
                    key = (param.device, param.dtype, *counter_values(rule, state))
                    where = param.device if group["capturable"] else "cpu"
                    for name in ("step", *rule.counters):
                        counter = state[name].to(where, torch.float64, copy=True)
                        state[name] = shared.setdefault((name, *key), counter)

    @torch.no_grad()
    def set_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Keep entries of a parameter at exactly zero (parameter, dual and moments), from now on.

        Args:
            param: one of this optimizer's parameters.
            mask: bool tensor of param's shape, True where the entry may be non-zero; None releases the mask
                (released entries start at zero, in the middle of the dead zone). For a sharded parameter: a DTensor
                sharded alike, or the whole mask, the same on every rank.

        Raises:
            KeyError: not a parameter of this optimizer.
            TypeError, ValueError: no bool tensor, or another shape or sharding; nothing was changed.
        """
        described = self._describe_param(param)
        if not described:
            raise KeyError("set_mask: not a parameter of this optimizer")
        if mask is not None:
            if not torch.is_tensor(mask) or mask.dtype != torch.bool:
                got = mask.dtype if torch.is_tensor(mask) else type(mask).__name__
                raise TypeError(f"set_mask: the mask of {described} must be a tensor of dtype torch.bool, got {got}")
            if mask.shape != param.shape:
                shapes = f"{tuple(mask.shape)}, the parameter {tuple(param.shape)}"
                raise ValueError(f"set_mask: the mask of {described} has shape {shapes}")
        state = self.state[param]
        if mask is None:
            state.pop("mask", None)
        else:
            mask = mask_as(param, mask)
            state["mask"] = mask if is_sharded(param) else _masks.pack(mask)
            for tensor in (param, *(t for key, t in state.items() if key not in (*COUNTERS, "mask"))):
                local(tensor).masked_fill_(~local(mask), 0)
        self._forget_plans()

    def get_mask(self, param: Tensor) -> Tensor | None:
        """The bool mask set on a parameter (a DTensor for a sharded one), or None."""
        packed = self.state[param].get("mask") if param in self.state else None
        return None if packed is None else _masks.unpack(packed, param)

    def density(self) -> Any:
        """Share of non-zeros per tensor as a `DensityReport`; the one method that synchronises with the device.

        With `count_nonzeros=True` it reads what the last step counted, otherwise it counts now.
        """
        from ..sparsity.report import optimizer_report

        return optimizer_report(self)

    def prox_point(self, param: Tensor) -> Tensor:
        """The sparse value of a parameter, which `density` counts: itself, unless the optimizer says otherwise."""
        return param.detach()

    def _buckets(self) -> Iterator[tuple[dict[str, Any], Bucket]]:
        """The buckets of the current plans, each with its parameter group."""
        for number, (_, plan) in self._plans.items():
            for bucket in plan.buckets if plan.is_current(self.state) else ():
                yield self.param_groups[number], bucket

    def _forget_plans(self) -> None:
        self._plans = {}
        self._checked: dict[int, Any] = {}  # values of a group and its regularizer that passed
        self._captured = vars(self).get("_captured", [])
        self._cut: tuple[Any, list[Any]] | None = None  # of _collective
        self._sharded = any(map(is_sharded, self._params()))

    def _params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with regularizers as plain data, so that `torch.load(weights_only=True)` reads it."""
        first = self.register_state_dict_post_hook(_checkpoint.plain, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that state keeps its dtype: an fp32 dual of a bf16 weight stays fp32."""
        live = [group["reg"] for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def read(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            """The last pre-hook: the dict as other hooks left it."""
            if missing := {"state", "param_groups"} - {*given}:
                raise KeyError(f"{type(self).__name__}: the state dict has no {', '.join(map(repr, sorted(missing)))}")
            loaded.update(given, param_groups=[dict(group) for group in given["param_groups"]])
            for group in loaded["param_groups"]:
                if isinstance(group.get("reg"), dict):
                    group["reg"] = Regularizer.from_dict(group["reg"])
            _checkpoint.check(self, loaded)
            for group in loaded["param_groups"]:
                group.pop(_checkpoint.MASKS, None)
            return loaded

        def restore(_: Any) -> None:
            """The first post-hook: tensors of their own, in the dtype that was saved."""
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, param in zip(ids, params):
                for key, value in loaded["state"].get(i, {}).items():
                    if key in COUNTERS:
                        self.state[param][key] = torch.tensor(float(value), dtype=torch.float64)
                    elif key == "mask" and not is_sharded(param):
                        self.state[param][key] = _masks.pack(value.to(param.device))
                    else:
                        self.state[param][key] = value.to(param.device, copy=True)
            held: dict[int, Any] = {}  # groups that hold one regularizer may have parted in the dict
            for group, reg in zip(self.param_groups, live):
                new = group["reg"]
                if reg is not None and type(reg) is type(new) and held.setdefault(id(reg), new) == new:
                    for name, value in vars(new).items():  # a handle held by the user stays live, a tensor too
                        if torch.is_tensor(held_tensor := getattr(reg, name)):
                            held_tensor.fill_(value)
                        else:
                            vars(reg)[name] = value
                    group["reg"] = reg
            self._forget_plans()

        hooks = [
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._forget_plans()  # other hooks may have put tensors in

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's addition: no option of ours
        for group in self.param_groups:
            for name, value in {**self.defaults, **_checkpoint.FLAGS}.items():
                group.setdefault(name, value)
        self._forget_plans()


def is_capturing() -> bool:
    """Whether the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _strides(param: Tensor) -> tuple[int, ...]:
    return param.stride() if _masks.is_dense(param) else torch.empty_like(param, device="meta").stride()
