import dataclasses
import json
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from switchx.errors import UserError
from switchx.interop import hf
from switchx.interop.hf import load
from switchx.models.t5 import T5

ORACLES = pathlib.Path(__file__).parents[1] / "oracles" / "huggingface"
CASES = sorted(path.name for path in ORACLES.iterdir())


def oracle(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(ORACLES / case / "oracle.npz"))


def inputs(arrays):
    return (arrays["input_ids"], arrays["decoder_input_ids"]), {
        "encoder_mask": arrays["attention_mask"],
        "capture_router": True,
    }


def forward(loaded, arrays):
    arguments, options = inputs(arrays)
    apply = jax.jit(lambda params: loaded.model.apply({"params": params}, *arguments, **options))
    return apply(loaded.params)


def sparse_layers(config):
    """(stack, its tag in the oracle, place in the stack's statistics, layer)."""
    for stack, sparse in (("encoder", config.encoder_sparse), ("decoder", config.decoder_sparse)):
        layers = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
        for place, layer in enumerate(layers):
            yield stack, f"{stack[:3]}_{layer}", place


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward_pass_in_float32(case, scan_layers):
    want, loaded = oracle(case), load(ORACLES / case, scan_layers=scan_layers)
    output = forward(loaded, want)
    for found, name in ((output.logits, "logits"), (output.encoded, "encoder_last_hidden_state")):
        np.testing.assert_allclose(found, want[name], rtol=0, atol=2e-5 * abs(want[name]).max())
    for stack, tag, place in sparse_layers(loaded.config):
        stats, logits = output.router[stack][place], want[f"router_logits_{tag}"]
        np.testing.assert_allclose(stats.logits, logits, rtol=0, atol=2e-5 * abs(logits).max())
        np.testing.assert_array_equal(stats.expert_index[..., 0], want[f"expert_index_{tag}"])
        np.testing.assert_array_equal(stats.kept[..., 0], want[f"kept_{tag}"])
        np.testing.assert_allclose(stats.gate[..., 0], want[f"gate_{tag}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float64(case):
    want = oracle(case)
    with jax.enable_x64(True):
        found = forward(load(ORACLES / case, dtype="float64"), want).logits
        assert found.dtype == np.float64
    np.testing.assert_allclose(found, want["logits_f64"], rtol=0, atol=1e-9)


def test_some_oracles_drop_tokens():
    for case in ("switch_overflow", "switch_steps_bias_untied"):
        want = oracle(case)
        assert not all(want[name].all() for name in want if name.startswith("kept_"))


def losses(loaded, found, params, arrays):
    """Cross-entropy, and Hugging Face's total: router losses pooled over the layers of a stack."""
    arguments, options = inputs(arrays)
    output = loaded.model.apply({"params": params}, *arguments, **options)
    labels = arrays["labels"]
    log_probs = jax.nn.log_softmax(output.logits)
    picked = jnp.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    cross_entropy = -jnp.sum(picked * (labels != -100)) / (labels != -100).sum()
    total, parts = cross_entropy, {}
    for stack, stats in output.router.items():
        if found.get(f"{stack}_sparse_step", 0) <= 1:
            continue  # Hugging Face leaves these stacks out
        logits = jnp.concatenate([layer.logits for layer in stats], axis=1)
        experts = logits.shape[-1]
        z_loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        first = jax.nn.one_hot(jnp.argmax(logits, axis=-1), experts)
        share = first.mean(axis=1) * jax.nn.softmax(logits).mean(axis=1)
        aux_loss = experts**2 * share.mean()
        parts |= {f"{stack}_z_loss": z_loss, f"{stack}_aux_loss": aux_loss}
        total += found["router_z_loss_coef"] * z_loss + found["router_aux_loss_coef"] * aux_loss
    return total, {"loss_ce": cross_entropy, "loss_total": total, **parts}


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_five_steps(case):
    want, loaded = oracle(case), load(ORACLES / case)
    found = json.loads((ORACLES / case / "config.json").read_text())
    step = jax.jit(
        jax.value_and_grad(lambda params: losses(loaded, found, params, want), has_aux=True)
    )
    (_, parts), gradients = step(loaded.params)
    for name, value in parts.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)

    arrays = load_file(ORACLES / case / "model.safetensors")
    embedding, copies = hf._embedding(arrays, case)
    by_name = {}
    for rule in hf._rules(loaded.config, found["model_type"], embedding):
        leaf = gradients
        for key in rule.ours.split("/"):
            leaf = leaf[key]
        leaf = np.asarray(leaf).swapaxes(-1, -2) if rule.transpose else np.asarray(leaf)
        by_name |= dict(zip(rule.theirs, leaf if len(rule.theirs) > 1 else [leaf], strict=True))
    checked = 0
    for name in want:
        theirs = name.removeprefix("grad:")
        if theirs == name or theirs in copies:
            continue
        limit = 2e-4 * abs(want[name]).max()
        np.testing.assert_allclose(by_name[theirs], want[name], rtol=0, atol=limit, err_msg=name)
        checked += 1
    assert checked >= 7
    # Where there are several tables in Hugging Face, ours gets the sum of their gradients.
    tables = [want[f"grad:{name}"] for name in copies if f"grad:{name}" in want]
    total = np.sum(tables, axis=0)
    np.testing.assert_allclose(by_name[embedding], total, rtol=0, atol=2e-4 * abs(total).max())

    if "sgd_losses" in want:
        params, values = loaded.params, []
        for _ in want["sgd_losses"]:
            (value, _), gradients = step(params)
            values.append(float(value))
            params = jax.tree.map(lambda leaf, grad: leaf - 0.002 * grad, params, gradients)
        np.testing.assert_allclose(values, want["sgd_losses"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("case", CASES)
def test_both_styles_of_configuration_say_the_same(case, tmp_path):
    folder = tmp_path / case
    shutil.copytree(ORACLES / case, folder)
    shutil.move(folder / "config.v4style.json", folder / "config.json")
    assert load(folder).config == load(ORACLES / case).config


def test_configuration_of_a_published_checkpoint():
    published = {
        "model_type": "switch_transformers",
        "vocab_size": 32128,
        "d_model": 768,
        "d_ff": 3072,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "num_experts": 8,
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "router_type": "tokens_masked",
    }
    config = hf.model_config(published, tied=True, source="x")
    assert config.num_params == 619_339_008
    assert config.encoder_sparse == config.decoder_sparse == (False, True) * 6
    assert config.moe is not None and config.moe.expert_capacity == 64


def test_a_switch_model_without_sparse_layers_is_dense():
    found = json.loads((ORACLES / "switch" / "config.json").read_text())
    found |= {"encoder_sparse_step": 0, "decoder_sparse_step": 0}
    assert hf.model_config(found, tied=True, source="x").moe is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_sparse_encoder_layers": 4}, (1, 4, 7, 10)),
        ({"num_sparse_encoder_layers": 12}, tuple(range(12))),
        ({"num_sparse_encoder_layers": 0}, (1,)),  # Hugging Face's own reading of 0
        ({"num_sparse_encoder_layers": 0, "encoder_sparse_step": 0}, ()),
        ({"num_sparse_encoder_layers": 6, "encoder_sparse_step": 4}, (1, 5, 9)),
        ({"num_sparse_encoder_layers": 5}, (1, 3, 5, 7, 9, 11)),  # 12 // 5 = 2
    ],
)
def test_which_layers_are_sparse(fields, expected):
    assert hf._sparse_layers(fields, "encoder", 12) == expected


class TestBadFolders:
    @pytest.fixture
    def folder(self, tmp_path) -> pathlib.Path:
        shutil.copytree(ORACLES / "switch", tmp_path / "model")
        return tmp_path / "model"

    def change(self, folder, **fields):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="nowhere': no such folder"):
            load(tmp_path / "nowhere")

    def test_another_kind_of_model(self, folder):
        self.change(folder, model_type="llama")
        with pytest.raises(UserError, match="'llama' model; supported are t5, mt5, switch"):
            load(folder)

    def test_an_activation_without_counterpart(self, folder):
        self.change(folder, dense_act_fn="mish", feed_forward_proj="mish")
        with pytest.raises(UserError, match="'mish' is not supported"):
            load(folder)

    def test_a_field_that_is_missing(self, folder):
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        del fields["d_kv"]
        path.write_text(json.dumps(fields))
        with pytest.raises(UserError, match="config.json lacks 'd_kv'"):
            load(folder)

    def test_broken_files(self, folder):
        (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
        with pytest.raises(UserError, match="model.safetensors' cannot be read"):
            load(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(UserError, match="config.json' cannot be read"):
            load(folder)

    def test_pickles_are_opened_on_request_only(self, folder, monkeypatch):
        want = load(folder).params
        arrays = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="holds no weights: no model.safetensors"):
            load(folder)
        (folder / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(UserError, match="unpickling can run code.*--allow_pickle"):
            load(folder)
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(UserError, match="needs PyTorch: pip install torch"):
            load(folder, allow_pickle=True)

        class Torch(types.ModuleType):
            """Stands in for PyTorch, which is no dependency."""

            @staticmethod
            def load(path, *, map_location, weights_only):
                assert path == folder / "pytorch_model.bin" and weights_only is True
                tensor = types.SimpleNamespace
                return {
                    name: tensor(float=lambda array=array: tensor(numpy=lambda: array))
                    for name, array in arrays.items()
                }

        monkeypatch.setitem(sys.modules, "torch", Torch("torch"))
        found = load(folder, allow_pickle=True).params
        jax.tree.map(np.testing.assert_array_equal, found, want)

        def refuse(*args, **options):
            raise RuntimeError("Weights only load failed\nmore")

        monkeypatch.setattr(Torch, "load", refuse)
        with pytest.raises(UserError, match="pytorch_model.bin' cannot be read: Weights only"):
            load(folder, allow_pickle=True)

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("model.json", "switchx run directory, which needs no conversion"),
            ("checkpoint", "a T5X checkpoint"),
            ("adapter_config.json", "a PEFT adapter"),
            ("model_index.json", "a diffusers pipeline"),
            ("readme.txt", "has no config.json"),
        ],
    )
    def test_another_kind_of_folder(self, tmp_path, name, what):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=f"{what}.*; supported are .*switch_transformers"):
            load(tmp_path)

    def test_a_file_or_a_configuration_without_kind(self, folder):
        with pytest.raises(UserError, match="is a file; give the folder"):
            load(folder / "config.json")
        (folder / "config.json").write_text("{}")
        with pytest.raises(UserError, match="no model_type in its config.json; supported are"):
            load(folder)

    def test_a_run_directory_with_its_config_json(self, tmp_path):
        for name in ("config.json", "model.json"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="is a switchx run directory, which needs no conv"):
            load(tmp_path)

    def test_json_too_deep_to_parse(self, tmp_path):
        (tmp_path / "config.json").write_text("[" * 100_000)
        with pytest.raises(UserError, match="config.json' cannot be read"):
            load(tmp_path)

    def test_a_number_of_experts_that_cannot_be(self, folder):
        self.change(folder, num_experts=10**9)
        with pytest.raises(UserError, match="num_experts = 1000000000 should be an integer, at"):
            load(folder)

    def test_the_kind_is_told_before_the_weights_are_read(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(UserError, match="'bert' model"):
            load(tmp_path)

    def test_arrays_of_another_model(self, folder):
        self.change(folder, d_ff=50)
        with pytest.raises(UserError, match=r"is config.json that of another model\?"):
            load(folder)

    def test_arrays_left_over_or_missing(self, folder):
        path = folder / "model.safetensors"
        arrays = load_file(path)
        save_file({**arrays, "surplus": np.zeros(3, np.float32)}, path)
        with pytest.raises(UserError, match="surplus fit nowhere"):
            load(folder)
        del arrays["encoder.block.1.layer.0.SelfAttention.q.weight"]
        save_file(arrays, path)
        with pytest.raises(UserError, match=r"no array 'encoder.block.1.layer.0.SelfAttention.q"):
            load(folder)

    def test_tables_that_differ(self, folder):
        path = folder / "model.safetensors"
        arrays = load_file(path)
        arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"] + 1
        save_file(arrays, path)
        with pytest.raises(UserError, match="share one embedding"):
            load(folder)


class TestFiles:
    def shards(self, folder, names=("a.safetensors", "b.safetensors")):
        shutil.copytree(ORACLES / "switch", folder)
        path = folder / "model.safetensors"
        arrays = load_file(path)
        path.unlink()
        keys = sorted(arrays)
        weight_map = {}
        for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
            target = folder / pathlib.Path(name).name
            save_file({key: arrays[key] for key in part}, target)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def test_shards(self, tmp_path):
        self.shards(tmp_path / "sharded")
        whole, parts = load(ORACLES / "switch"), load(tmp_path / "sharded")
        jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)

    @pytest.mark.parametrize(
        "name", ["../b.safetensors", "/b.safetensors", "a/../../b.safetensors", "./../b", ".."]
    )
    def test_a_path_cannot_leave_the_folder(self, tmp_path, name):
        self.shards(tmp_path / "sharded")
        index = tmp_path / "sharded" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(UserError, match="is not a file of this folder") as error:
            load(tmp_path / "sharded")
        assert repr(name) in str(error.value)

    def test_a_link_is_followed(self, tmp_path):
        # The hub's cache is made of links to files elsewhere; the user made them, no index did.
        self.shards(tmp_path / "sharded")
        shard = min((tmp_path / "sharded").glob("*.safetensors"))
        shard.rename(tmp_path / "blob")
        shard.symlink_to(tmp_path / "blob")
        assert load(tmp_path / "sharded").config == load(ORACLES / "switch").config

    def test_bfloat16(self, tmp_path):
        folder = tmp_path / "narrow"
        shutil.copytree(ORACLES / "switch", folder)
        path = folder / "model.safetensors"
        arrays = {key: value.astype(jnp.bfloat16) for key, value in load_file(path).items()}
        from safetensors.flax import save_file as save_flax

        save_flax({key: jnp.asarray(value) for key, value in arrays.items()}, path)
        params = load(folder).params
        want = load(ORACLES / "switch").params
        for found, exact in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, exact, rtol=2**-8)


def test_the_model_is_that_of_the_configuration():
    loaded = load(ORACLES / "switch", scan_layers=True, dtype="bfloat16")
    assert loaded.model == T5(loaded.config)
    assert loaded.config.scan_layers and loaded.config.dtype == "bfloat16"
    assert dataclasses.replace(loaded.config, dtype="float32").num_params == sum(
        leaf.size for leaf in jax.tree.leaves(loaded.params)
    )
