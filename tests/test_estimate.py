# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What an estimate says: bytes against tensors, figures worked by hand, sharding, monotonicity."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_agents._trl import add_fused_lm_head
from trl_agents.estimate.cluster import GIB, GPUS, Cluster, Sharding, find_gpu
from trl_agents.estimate.dry_run import LiveBytes, _Key, _run, dry_run
from trl_agents.estimate.episodes import Episode, Reading, measure_reading
from trl_agents.estimate.memory import estimate_memory, head_bytes, kv_cache_bytes
from trl_agents.estimate.plan import Adapter, Plan
from trl_agents.estimate.published import PUBLISHED
from trl_agents.estimate.report import Estimate, describe, estimate, suggest, tabulate
from trl_agents.estimate.shape import measure_shape, read_shape
from trl_agents.estimate.states import count_states, frozen_bytes, quantised_bytes
from trl_agents.estimate.timing import Times, estimate_times, forward_flops, update_flops
from trl_agents.rollout.cache import SlotCache
from trl_agents.rollout.slots import SlotModel


# As the models' pages on the Hub have it
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "google/gemma-2-2b-it": 2_614_341_888,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "EleutherAI/pythia-2.8b-deduped": 2_775_208_960,
}
PLAN = Plan(
    recipe="grpo_bandit", trainer="grpo", model=None, adapter=None, weight_bytes=4, bf16=False,
    optimizer="adamw_torch_fused", checkpointing=False, attention="sdpa", kl=False, separate_critic=False,
    reward_model=False, rows=2, row_length=40, accumulation=1, updates=1, old_logps=False, mean_row_length=40.0,
    episodes=4, side_by_side=2, episode=Episode(8, (20, 4), (20, 32), (40,)), longest=40, grown_by=256,
)  # fmt: skip
MIXED = replace(PLAN, bf16=True)
ONE = Sharding()
H100 = Cluster(find_gpu("H100"))


@pytest.fixture(scope="module")
def tiny():
    return read_shape("tiny")


def spread(kind: str, n: int = 8, **changes) -> Cluster:
    return replace(H100, n_gpus=n, sharding=Sharding(kind, **changes))


def make(shape, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(shape.config), attn_implementation="sdpa")
    return model.to(dtype)


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


# -- against tensors --------------------------------------------------------------------------------------------------


def test_published_shapes_have_the_published_sizes():
    assert {name: read_shape(name).n_parameters for name in PUBLISHED} == PARAMETERS
    positions = [read_shape(f"Qwen/Qwen2.5-7B{kind}").positions for kind in ("", "-Instruct")]
    assert positions == [131072, 32768]


@pytest.mark.parametrize("rank", [0, 4])
def test_states_are_those_of_the_tensors(tiny, rank):
    model = make(tiny)
    plan = replace(PLAN, adapter=Adapter(rank) if rank else None)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    states = count_states(tiny, plan, ONE)
    assert states.weights == bytes_of(model.parameters())
    assert states.gradients == bytes_of(parameter.grad for parameter in trained)
    assert states.optimizer == bytes_of(moments)
    assert states.n_trained == sum(parameter.numel() for parameter in trained)
    assert states.resting == states.weights + states.optimizer


def test_lora_takes_the_layers_that_peft_takes(tiny):
    named = ("q_proj", "v_proj")
    for targets, config in ((named, list(named)), (None, None)):
        model = get_peft_model(make(tiny), LoraConfig(r=2, target_modules=config, task_type="CAUSAL_LM"))
        plan = replace(PLAN, adapter=Adapter(2, targets))
        assert count_states(tiny, plan, ONE).n_trained == model.get_nb_trainable_parameters()[0]
    for nowhere in ("wq", "proj"):  # the end of a name is no name
        with pytest.raises(ValueError, match=nowhere):
            count_states(tiny, replace(PLAN, adapter=Adapter(2, (nowhere,))), ONE)


def test_optimizers_that_are_not_known(tiny):
    for name in ("galore_adamw", "adamw_torch_4bit"):
        with pytest.raises(ValueError, match=f"optim='{name}' keeps is not known"):
            count_states(tiny, replace(PLAN, optimizer=name), ONE)


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_weights_are_those_of_bitsandbytes(double):
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 160)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert quantised_bytes(weight.numel(), double) == bytes_of(tensors)


def test_adafactor_keeps_rows_and_columns(tiny):
    from transformers.optimization import Adafactor

    model = make(tiny)
    optimizer = Adafactor(model.parameters(), scale_parameter=False, relative_step=False, lr=1e-3)
    model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    plan = replace(PLAN, optimizer="adafactor")
    assert count_states(tiny, plan, ONE).optimizer == bytes_of(value for value in kept if value.dim() > 0)
    # DeepSpeed flattens what it shares out
    assert count_states(tiny, plan, Sharding("zero2"), 1).optimizer == 4 * tiny.n_parameters


def test_the_cache_is_the_rollouts(tiny):
    model = make(tiny).eval()
    slots = SlotModel(model, 3)
    slots.read([0, 1, 2], [[1] * 300] * 3, [0, 0, 0])
    real = bytes_of(tensor for layer in slots.cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(tiny, 3, 300, 4, SlotCache.GROWTH) == real
    assert kv_cache_bytes(tiny, 3, 300, 2) == real / 2 * 300 / 512


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="its output head makes whole logits")
@pytest.mark.parametrize(
    "settings",
    [{}, {"checkpointing": True}, {"attention": "eager"}, {"lora_rank": 4}, {"autocast": True}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_a_dry_run_needs_what_the_real_one_needs(tiny, settings):
    """The same passes with real tensors, peak against peak."""
    found = dry_run(tiny, 2, 48, dtype=torch.float32, head=True, **settings)
    config = copy.deepcopy(tiny.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.get("attention", "sdpa")).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if "lora_rank" in settings:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if "checkpointing" in settings:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros((2, 48), dtype=torch.long)
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in settings):
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
        saved = live.live
        output.log_probs.sum().backward()
    assert found.peak == pytest.approx(live.peak, rel=0.01)
    assert found.saved == pytest.approx(saved, rel=0.03)
    assert found.moved == pytest.approx(live.moved, rel=0.03)


def test_few_layers_tell_of_many():
    """Two and four layers, extended, are what eight need."""
    eight = read_shape("tiny", {"num_hidden_layers": 8})
    for settings in ({}, {"checkpointing": True}):
        extended = dry_run(eight, 2, 48, dtype=torch.float32, **settings)
        whole = _run(
            config=_Key(eight.config), n_layers=8, rows=2, length=48, dtype=torch.float32, autocast=False,
            checkpointing="checkpointing" in settings, attention="sdpa", lora_rank=0, lora_targets=None,
            lora_dtype=torch.float32, head=False, gradients=True,
        )  # fmt: skip
        assert extended.saved == pytest.approx(whole.saved, rel=0.001)
        assert extended.peak == pytest.approx(whole.peak, rel=0.02)
        assert extended.n_ops == pytest.approx(whole.n_ops, rel=0.01)


def test_operations_are_pytorchs_own_count(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    # Its counter knows the products of eager attention
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny.config), attn_implementation="eager").train()
    ids = torch.zeros((2, 48), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids).logits.sum()
    assert counter.get_total_flops() == pytest.approx(forward_flops(tiny, 96, 48), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # The estimate adds TRL's second computation of the logits
    head = 2 * 96 * tiny.vocab_size * tiny.hidden_size
    both = counter.get_total_flops() + forward_flops(tiny, 96, 48)
    assert both == pytest.approx(update_flops(tiny, replace(PLAN, mean_row_length=48), 96) - head, rel=0.05)


# -- by hand ----------------------------------------------------------------------------------------------------------


def per_parameter(plan, kind="none", n=1, **changes):
    shape = read_shape("codellama/CodeLlama-7b-hf")
    states = count_states(shape, plan, Sharding(kind, **changes), n)
    return [getattr(states, name) / shape.n_parameters for name in ("weights", "master", "gradients", "optimizer")]


def test_seven_billion_parameters_take_16_bytes_each():
    """Mixed precision and Adam: 4 + 4 + 8, with DeepSpeed 2 + 2 + 4 + 8: 108 GB; 18 with autocast's copies."""
    assert per_parameter(MIXED) == [4, 0, 4, 8]
    assert per_parameter(MIXED, "zero1") == per_parameter(MIXED, "zero3") == [2, 4, 2, 8]
    assert per_parameter(replace(PLAN, weight_bytes=2, bf16=True)) == [2, 0, 2, 4]  # all in bfloat16
    memory = estimate_memory(read_shape("codellama/CodeLlama-7b-hf"), replace(MIXED, checkpointing=True), H100)
    n = PARAMETERS["codellama/CodeLlama-7b-hf"]
    assert sum(memory.update[name] for name in ("weights", "gradients", "optimizer states")) == 16 * n
    assert memory.update["copies in bfloat16"] == pytest.approx(2 * n, rel=0.05)  # what autocast makes besides
    assert not memory.fits and memory.peak < 19 * n


def test_zero_divides_what_it_should():
    assert per_parameter(MIXED, "ddp", 8) == [4, 0, 4, 8]
    assert per_parameter(MIXED, "zero1", 8) == [2, 4 / 8, 2, 8 / 8]
    assert per_parameter(MIXED, "zero2", 8) == [2, 4 / 8, 2 / 8, 8 / 8]
    assert per_parameter(MIXED, "zero3", 8) == [2 / 8, 4 / 8, 2 / 8, 8 / 8]
    assert per_parameter(MIXED, "fsdp", 8) == [4 / 8, 0, 4 / 8, 8 / 8]
    assert per_parameter(MIXED, "zero2", 8, offload_optimizer=True) == [2, 0, 0, 0]
    assert per_parameter(MIXED, "zero3", 8, offload_optimizer=True, offload_parameters=True) == [0, 0, 0, 0]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_estimate_agrees(stage):
    """Its figure holds gradients in float32 besides, which lie there in the update of the weights."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    n, shape = 8, read_shape("codellama/CodeLlama-7b-hf")
    states = count_states(shape, MIXED, Sharding(f"zero{stage}"), n)
    own = states.weights + states.master + states.gradients + states.optimizer + 4 * shape.n_parameters / n
    if stage == 2:
        _, theirs = estimate_zero2_model_states_mem_needs(shape.n_parameters, n, cpu_offload=False)
    else:
        _, theirs, _ = estimate_zero3_model_states_mem_needs(
            shape.n_parameters, 0, n, cpu_offload=False, cpu_offload_params=False
        )
        own -= 2 * shape.n_parameters / n  # which it counts once, as weights or as gradients
    assert own == pytest.approx(theirs, rel=0.001)


def test_references_critics_and_adapters():
    shape = read_shape("codellama/CodeLlama-7b-hf")
    full = count_states(shape, replace(MIXED, kl=True), ONE)
    assert full.reference == 4 * shape.n_parameters
    assert count_states(shape, replace(MIXED, kl=True), Sharding("zero3"), 8).reference == 2 * shape.n_parameters / 8
    adapted = count_states(shape, replace(MIXED, kl=True, adapter=Adapter(16), weight_bytes=2), ONE)
    assert adapted.reference == 0  # the model without its adapter
    assert adapted.gradients == 4 * adapted.n_trained and adapted.n_trained < 0.01 * shape.n_parameters
    critic = count_states(shape, replace(MIXED, trainer="ppo", separate_critic=True), ONE)
    head = shape.hidden_size + 1
    assert critic.n_trained == shape.n_parameters + shape.n_trunk + head
    assert count_states(shape, replace(MIXED, trainer="ppo"), ONE).n_trained == shape.n_parameters + head


def test_qlora_takes_half_a_byte():
    """QLoRA, section 3: 0.5 bytes and, with double quantisation, 0.127 bits of scales a parameter."""
    shape = read_shape("codellama/CodeLlama-7b-hf")
    plain, double = (frozen_bytes(shape, Adapter(16, bits=4, double_quantization=which), 2) for which in (False, True))
    rest = 2 * (shape.n_parameters - shape.n_linear)
    assert 8 * (plain - rest) / shape.n_linear == pytest.approx(4.5, abs=0.001)
    assert 8 * (double - rest) / shape.n_linear == pytest.approx(4.127, abs=0.001)
    assert frozen_bytes(shape, Adapter(16), 2) == 2 * shape.n_parameters


def test_optimizers():
    def states(name, **changes):
        shape = read_shape("codellama/CodeLlama-7b-hf")
        return count_states(shape, replace(MIXED, optimizer=name, **changes), ONE).optimizer / shape.n_parameters

    assert states("sgd") == 0 and states("rmsprop") == 4 and states("lion_32bit") == 4
    assert states("paged_adamw_8bit") == pytest.approx(2 + 0.03 + 0.23, abs=0.02)  # embeddings stay in 32 bits
    with pytest.raises(ValueError, match="shampoo"):
        states("shampoo")


def test_the_head_on_a_gpu():
    shape = read_shape("Qwen/Qwen3-0.6B")
    tile, hidden, table = 4096 * 32768 * 2, 8192 * 1024 * 4, 151936 * 1024 * (4 + 2)
    assert head_bytes(shape, 8192, 2, 2, trained=True) == tile + hidden + table
    assert head_bytes(shape, 8192, 2, 2, trained=False) == tile + hidden


# -- more of one is more of the other ---------------------------------------------------------------------------------


def test_memory_grows_with_what_it_should(tiny):
    base = estimate_memory(tiny, PLAN, H100)
    assert base.peak < estimate_memory(tiny, replace(PLAN, rows=8, row_length=80), H100).peak
    assert sum(base.rollout.values()) < sum(
        estimate_memory(tiny, replace(PLAN, side_by_side=64), H100).rollout.values()
    )
    kept = [estimate_memory(tiny, replace(PLAN, checkpointing=on), H100).update["activations kept"] for on in (0, 1)]
    assert kept[1] < kept[0] / 2
    larger = read_shape("Qwen/Qwen3-0.6B")
    peaks = [
        estimate_memory(larger, replace(MIXED, checkpointing=True), spread(kind)).peak for kind in ("ddp", "zero2")
    ]
    assert peaks[1] < peaks[0]
    gathered = estimate_memory(larger, replace(MIXED, checkpointing=True), spread("zero3"))
    assert gathered.rollout["gathered weights"] == 2 * larger.n_parameters  # whole, for the rollout
    vllm = estimate_memory(tiny, replace(PLAN, vllm_share=0.3), H100)
    assert vllm.rollout["vLLM"] == 0.3 * 80 * GIB and "KV cache" not in vllm.rollout


def test_times_grow_with_what_they_should():
    shape = read_shape("Qwen/Qwen3-0.6B")
    plan = replace(MIXED, weight_bytes=2, checkpointing=True)

    def rollout(cluster=H100, **changes):
        return sum(estimate_times(shape, replace(plan, **changes), cluster).rollout.values())

    faster = replace(H100, op_seconds=0.0)
    assert rollout() > rollout(faster)  # a step of a small model is starting operations
    assert "starting operations" in estimate_times(shape, plan, H100).bottleneck
    assert rollout(env_delay=1.0) == pytest.approx(rollout() + 2 * 2 * 1.0)  # two turns, two waves
    assert rollout(kl=True) > rollout() and rollout(vllm_share=0.3) < rollout()
    slow = replace(faster, gpu=replace(faster.gpu, memory_gbps=faster.gpu.memory_gbps / 2))
    assert rollout(slow) > rollout(faster)
    updates = [update_flops(shape, replace(plan, checkpointing=on), 80) for on in (False, True)]
    assert updates[0] < updates[1] < 4 / 3 * updates[0]
    assert update_flops(shape, plan.by("lora"), 80) < updates[1]


def test_bytes_between_gpus():
    """A ring of n: an all-reduce sends 2 (n-1)/n of the gradients; between two nodes it goes at the network's pace."""
    shape, plan = read_shape("Qwen/Qwen3-0.6B"), replace(MIXED, weight_bytes=2, checkpointing=True, accumulation=4)

    def seconds(cluster):
        return estimate_times(shape, plan, cluster).update.get("update: communication", 0.0)

    ddp = spread("ddp")
    assert seconds(H100) == 0
    assert seconds(ddp) == pytest.approx(2 * 7 / 8 * 2 * shape.n_parameters / (450e9 * 0.7))
    assert seconds(replace(ddp, n_nodes=2)) == pytest.approx(seconds(ddp) * 450 / 50)
    assert seconds(ddp) < seconds(spread("zero2")) < seconds(spread("zero3"))


def test_bottleneck_weighs_all_updates():
    assert Times({"a": 3.0}, {"b": 2.0}, updates=1).bottleneck == "a"
    assert Times({"a": 3.0}, {"b": 2.0}, updates=2).bottleneck == "b"
    assert Times({"a": 3.0}, {"b": 2.0}, updates=2).cycle == 7.0


# -- episodes ---------------------------------------------------------------------------------------------------------


def test_tokens_of_an_episode():
    chat = Reading("chat", (10, 2, 2))
    assert chat.episode(5) == Episode(5, (10, 2, 2), (10, 17, 24), (29,))
    assert chat.episode(5, limit=20) == Episode(5, (10, 2), (10, 17), (20,))  # the third turn does not fit
    assert chat.episode(5, limit=8).rows == (8,)
    window = Reading("window", (10, 12, 14), kept=8)
    assert window.episode(5) == Episode(5, (10, 4, 6), (10, 12, 14), (15, 17, 19))
    assert window.episode(5, limit=18).rows == (15, 17, 18)


@pytest.mark.parametrize("context", ["chat", "window"])
def test_an_environment_says_how_long_its_episodes_are(context):
    played = measure_reading("trl_agents/Bandit-v0", {"horizon": 7, "n_arms": 3}, context)
    assert len(played.turns) == 7
    if context == "window":
        assert list(played.turns) == sorted(played.turns) and 0 < played.kept < played.turns[0]
    else:
        assert played.turns[0] > 3 * played.turns[1]
    assert len(measure_reading("trl_agents/Bandit-v0", {"horizon": 7}, context, max_turns=3).turns) == 3


class Unlisted:
    """Asks four times, and says of no action that it is legal."""

    instructions = "Say something."

    def reset(self, *, seed=None, options=None):
        self.left = 4
        return "Well?", {}

    def step(self, action):
        self.left -= 1
        return "And?", 0.0, self.left == 0, False, {}

    def close(self):
        pass


@pytest.mark.parametrize("context", ["chat", "window"])
def test_turns_that_cannot_be_played_at_random(context):
    with pytest.raises(ValueError, match="lists no actions .*--turns"):
        measure_reading("test_estimate:Unlisted", {}, context)
    assert len(measure_reading("test_estimate:Unlisted", {}, context, max_turns=4).turns) == 4


# -- what is said -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_comes_with_what_would():
    shape = read_shape("Qwen/Qwen3-8B")
    plan = replace(MIXED, checkpointing=True)
    found = estimate(shape, plan, Cluster(replace(find_gpu("L4"), memory_gib=12)))
    assert not found.memory.fits and found.headroom < 0
    assert "QLoRA" in suggest(found)
    text = describe(found)
    assert "does not fit" in text and "QLoRA" in text and "bottleneck: " in text
    eight = replace(spread("zero2"), gpu=replace(find_gpu("L4"), memory_gib=32))
    assert "zero3" in suggest(estimate(shape, plan, eight))
    huge = Estimate(replace(shape, n_parameters=10**12), plan.by("qlora"), H100, found.memory, found.times)
    assert suggest(huge) is None


def test_a_fit_is_told_with_its_headroom(tiny):
    found = estimate(tiny, PLAN, H100)
    assert "fits: 78.5 GiB there" in describe(found)
    assert found.as_dict()["memory"]["fits"] is True and found.as_dict()["seconds"]["cycle"] > 0


def test_the_table_has_brackets_round_what_does_not_fit():
    table = tabulate([read_shape("Qwen/Qwen3-8B")], replace(MIXED, checkpointing=True), H100, ["none"])
    full, lora, qlora = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert full[0] == "Qwen/Qwen3-8B" and full[1] == "all weights" and full[2].startswith("(")
    assert not lora[2].startswith("(") and int(qlora[2]) < int(lora[2])


def test_methods_keep_what_a_plan_has():
    assert PLAN.by("full") is PLAN and PLAN.by("lora").adapter == Adapter(16)
    qlora = replace(MIXED, adapter=Adapter(8, bits=4, double_quantization=True), kl=True)
    assert qlora.by("qlora") is qlora and qlora.by("lora").adapter == Adapter(8, double_quantization=True)
    assert not qlora.reference and qlora.by("full").reference
    with pytest.raises(ValueError, match="'loraq'"):
        PLAN.by("loraq")


def test_the_catalogue_has_trls_figures():
    from trl.trainer.utils import get_peak_flops

    for name, gpu in GPUS.items():
        if theirs := get_peak_flops(name.replace("-", " ").replace("RTX", "RTX "), "bfloat16"):
            assert gpu.bf16_tflops * 1e12 == pytest.approx(theirs, rel=0.01), name
    assert find_gpu("rtx 4090") is GPUS["RTX4090"]
    with pytest.raises(ValueError, match="'H101'.*H100.*--cluster"):
        find_gpu("H101")


def test_a_mixture_of_experts_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=64, num_key_value_heads=1, num_local_experts=8, **sizes)
    with pytest.raises(ValueError, match="mixture of experts"):
        measure_shape(config, "mine")
