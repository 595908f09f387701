"""What the tests share: the project on the path, seeds, tiny transformers checkpoints, optional
real files.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in these tests may reach for a network
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

# The sizes of the tiny models. The epsilons are large so that a wrong one shows; 8 does not
# divide 30, as 14 not 384.
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=30
)
VISION |= dict(patch_size=8, layer_norm_eps=0.02)
TEXT = dict(
    vocab_size=99, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4
)
TEXT |= dict(num_key_value_heads=2, rms_norm_eps=0.01, max_position_embeddings=512)
IMAGE_TOKEN = 97


def edit_json(path, changes):
    """Change keys of a JSON file; "section.key" reaches inside, the value `...` removes the key."""
    content = json.loads(path.read_text())
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        place = content[section] if section else content
        place[key] = value
        if value is ...:
            del place[key]
    path.write_text(json.dumps(content))


def edit_weights(folder, change):
    """Rewrite model.safetensors after `change` has edited its dictionary of tensors."""
    tensors = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A toy world of 48 training scenes and 12 test scenes, in the real formats."""
    from toy import world

    return world.build(tmp_path_factory.mktemp("world") / "data", train_scenes=48, test_scenes=12)


@pytest.fixture(scope="session")
def toy():
    """The shipped TinyLLaVA on the CPU, for tests that do not change it."""
    from eval import TOY_MODEL, load_base

    return load_base(TOY_MODEL, "cpu")


@pytest.fixture
def make_checkpoint(tmp_path):
    """A factory of tiny LLaVA checkpoints written by transformers: `folder, reference =
    make_checkpoint("siglip")`.

    `reference` is the transformers model itself, in fp32. Every parameter is drawn with standard
    deviation 0.2, biases and norms too, so that a part left out or misplaced changes the logits.
    The head never chooses the image token.
    """
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    vision_configs = {
        "clip": transformers.CLIPVisionConfig,
        "siglip": transformers.SiglipVisionConfig,
    }
    text_configs = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}

    def make(
        vision="clip",
        text="llama",
        vision_config=(),
        text_config=(),
        name="checkpoint",
        **llava_config,
    ):
        head = {} if vision == "clip" else {"vision_use_head": False}
        config = transformers.LlavaConfig(
            vision_config=vision_configs[vision](**VISION | head | dict(vision_config)),
            text_config=text_configs[text](**TEXT | dict(text_config)),
            **dict(image_token_index=IMAGE_TOKEN) | llava_config,
        )
        reference = transformers.LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in reference.named_parameters():
                is_norm_weight = "norm" in parameter_name and parameter_name.endswith("weight")
                parameter.normal_(std=0.2).add_(1.0 if is_norm_weight else 0.0)
            reference.lm_head.weight[config.image_token_id] = 0
        reference.save_pretrained(tmp_path / name)
        return tmp_path / name, reference

    return make


@pytest.fixture
def real_file():
    """A finder of optional files of real models and benchmarks: `path =
    real_file("llava-1.5-7b-hf/config.json")`.

    They stand in ../shared/data beside the project or where NANOVLADVA_TEST_DATA says; a test
    without its file skips.
    """
    root = Path(os.environ.get("NANOVLADVA_TEST_DATA") or PROJECT.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"needs {name} of the test data (NANOVLADVA_TEST_DATA)")
        return root / name

    return find
