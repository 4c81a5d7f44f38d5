"""Whole runs against the torch pipelines, on tiny models with the same noise."""

from __future__ import annotations

import dataclasses as dc
import importlib

import numpy as np
import pytest

import sfumato
from sfumato import compiler, run
from sfumato.samplers import DDIM

from oracle import assert_close, to_torch
from runs import NEGATIVE, PROMPT, SIZE, mask, noise, picture


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_text_to_image(kind, pair):
    both = pair(kind)
    both.assert_same(both.ours(), both.theirs())


@pytest.mark.parity
def test_decoded_pictures_and_several_prompts(pair):
    both = pair("sd1", small=True)
    prompts, start = [PROMPT, "a blue bird"], noise((2, 8, 8, 4))
    want = both.pipeline(
        prompts, negative_prompt=[NEGATIVE, "dark"], latents=to_torch(start), num_inference_steps=3,
        guidance_scale=5.0, output_type="np",
    ).images  # fmt: skip
    got = sfumato.generate(
        both.model, prompts, negative=[NEGATIVE, "dark"], latents=start, steps=3, controls=[sfumato.CFG(5.0)], size=SIZE
    )
    for a, b in zip(got, want, strict=True):
        assert np.abs(a.array.astype(int) - np.round(b * 255)).max() <= 2


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_no_guidance_and_rescaled_guidance(kind, pair):
    both = pair(kind, small=True)
    both.assert_same(both.ours(controls=(), negative=None), both.theirs(guidance_scale=1.0, negative_prompt=None))
    both.assert_same(both.ours(controls=[sfumato.CFG(5.0, rescale=0.7)]), both.theirs(guidance_rescale=0.7))


@pytest.mark.parity
def test_a_distilled_model_is_told_its_guidance(pair):
    both = pair("sd1-lcm", small=True)
    told, plain = (both.ours(controls=[sfumato.CFG(scale)], negative=None) for scale in (4.0, 1.0))
    both.assert_same(told, both.theirs(guidance_scale=4.0, negative_prompt=None))
    both.assert_same(plain, both.theirs(guidance_scale=1.0, negative_prompt=None))
    assert np.abs(np.asarray(told) - np.asarray(plain)).max() > 1e-3
    closed = [sfumato.CFG(4.0, window=sfumato.Window(0.5, 0.5))]
    assert_close(both.ours(controls=closed, negative=None), plain, 1e-6)
    with pytest.warns(UserWarning, match="negative prompt has no effect"):
        both.assert_same(both.ours(controls=[sfumato.CFG(4.0)]), both.theirs(guidance_scale=4.0))
    with pytest.raises(sfumato.SfumatoError, match="rescale has nothing to do"):
        both.ours(controls=[sfumato.CFG(4.0, rescale=0.5)])


@pytest.mark.parity
def test_sdxl_without_a_negative_prompt(pair):
    """The checkpoint says force_zeros_for_empty_prompt."""
    both = pair("sdxl")
    assert both.model.options["force_zeros_for_empty_prompt"]
    both.assert_same(both.ours(negative=None), both.theirs(negative_prompt=None))


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "name"), [("sd1", "StableDiffusionImg2ImgPipeline"),
                                            ("sdxl", "StableDiffusionXLImg2ImgPipeline")])  # fmt: skip
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image(kind, name, strength, pair):
    both, settings = pair(kind).through(name), {"image": picture(), "strength": strength}
    both.assert_same(both.ours(**settings), both.theirs(**settings))


@pytest.mark.parity
def test_the_refiner_takes_over(pair):
    base, refiner = pair("sdxl"), pair("sdxl-refiner")
    middle = base.theirs(denoising_end=0.7)
    base.assert_same(base.ours(stop=0.7), middle)
    refiner.assert_same(
        refiner.ours(latents=middle, start=0.7), refiner.theirs(image=to_torch(middle), denoising_start=0.7)
    )


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "strength"), [("sd1", 1.0), ("sd1", 0.6), ("sd1-inpaint", 1.0), ("sdxl", 1.0)])
def test_inpainting(kind, strength, pair):
    name = "StableDiffusionXLInpaintPipeline" if kind == "sdxl" else "StableDiffusionInpaintPipeline"
    both = pair(kind, small=True).through(name)
    from_picture = {} if strength == 1 else {"image": picture(), "strength": strength}
    got = both.ours(controls=[sfumato.CFG(5.0), sfumato.Inpaint(picture(), mask())], **from_picture)
    want = both.theirs(**{"image": picture(), "mask_image": mask(), "strength": strength} | from_picture)
    both.assert_same(got, want)


@pytest.mark.parity
def test_the_picture_outside_the_mask_comes_back_exactly(pair):
    controls = [sfumato.CFG(5.0), sfumato.Inpaint(picture(), mask())]
    got = sfumato.generate(pair("sd1", small=True).model, PROMPT, steps=4, size=SIZE, controls=controls)
    known = np.asarray(picture())
    np.testing.assert_array_equal(got[0].array[:, :8], known[:, :8])
    assert (got[0].array[:, 8:] != known[:, 8:]).any()


@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint"])
def test_inpainting_in_two_parts(kind, pair):
    """The known part is noised by the seed's own noise, so that who goes on finds what the other left."""
    both = pair(kind, small=True)
    settings = {
        "sampler": DDIM(eta=0.5), "controls": [sfumato.CFG(5.0), sfumato.Inpaint(picture(), mask())], "seed": 3,
    }  # fmt: skip
    whole = both.ours(latents=None, **settings)
    middle = both.ours(latents=None, stop=0.5, **settings)
    assert_close(both.ours(latents=middle, start=0.5, **settings), whole, 1e-6)
    assert np.abs(middle - whole).max() > 0.1


def test_a_model_says_how_many_steps_it_wants(models):
    model = models("sd1")

    def steps(**options):
        return dc.replace(model, options=options).steps

    assert [steps(), steps(num_inference_steps=4)] == [30, 4]
    assert [steps(num_inference_steps=said) for said in (0, -3, "few", float("nan"))] == [30] * 4
    quick = dc.replace(model, options={"num_inference_steps": 2})
    (own,), (told,) = (sfumato.generate(quick, PROMPT, size=SIZE, **given) for given in ({}, {"steps": 2}))
    np.testing.assert_array_equal(own.array, told.array)
    assert own.metadata["settings"]["steps"] == 2


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("light", [False, True])
def test_a_large_decoder_is_compiled_when_the_sampler_works(monkeypatch, loaded, light, watched):
    """And a small one beside the sampler."""
    module, order = importlib.import_module("sfumato.generate"), []

    def rows(*given, own=module.sample_rows):
        for x in own(*given):
            order.append("sampler")
            yield x

    monkeypatch.setattr(compiler, "is_light", lambda leaves: light)
    monkeypatch.setattr(run.decode, "prepare", lambda *given: order.append("decoder") or (lambda: None))
    monkeypatch.setattr(module, "sample", lambda *given, own=module.sample: order.append("sampler") or own(*given))
    monkeypatch.setattr(module, "sample_rows", rows)
    settings = {"steps": 2, "size": SIZE} | ({"progress": lambda *row: None} if watched else {})
    assert len(sfumato.generate(loaded("sd1"), PROMPT, **settings)) == 1
    assert order[:2] == (["decoder", "sampler"] if light else ["sampler", "decoder"])
    order.clear()
    sfumato.generate(loaded("sd1"), PROMPT, output="latents", **settings)
    assert "decoder" not in order
