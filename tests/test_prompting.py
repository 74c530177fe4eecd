"""Methods of prompting: every text against one written by hand, budgets, and turns as chat.encode writes them."""
import numpy as np
import pytest

from data import chat
from data.prompting import METHODS, Stage, budgets, next_turn, opening
from data.sample import Sample
from test_templates import OWN, PATCHES, QWEN, VICUNA

PICTURE = np.zeros((8, 8, 3), np.uint8)
ANSWER = "Give only the final answer, inside <answer> </answer>."
# What each stage of a method adds to the question: (words of the drawn world, words for a real model, stop text).
WRITTEN = {
    "direct": [("", ANSWER, "</answer>")],
    "think": [("think .", f"Think step by step first. {ANSWER}", "</answer>")],
    "caption_first": [
        ("caption .", "Describe what of the picture matters for this question. Do not answer it yet.", ""),
        ("conclusion .", f"Now answer the question. {ANSWER}", "</answer>")],
    "stages_one_call": [
        ("stages .", "Reply in four parts: your plan inside <SUMMARY> </SUMMARY>, what of the picture matters inside "
         "<CAPTION> </CAPTION>, your reasoning step by step inside <REASONING> </REASONING>, and only the final answer "
         "inside <CONCLUSION> </CONCLUSION>.", "</CONCLUSION>")],
    "stages": [
        ("summary .", "Outline briefly how you will find the answer. Do not answer yet.", ""),
        ("caption .", "Describe what of the picture matters for the question.", ""),
        ("reasoning .", "Reason step by step from what you described.", ""),
        ("conclusion .", ANSWER, "</answer>")],
    "ccot": [
        ("graph .", "Write a scene graph of the picture as JSON: the objects that matter for this question, their "
         "attributes, and the relations between them. Write nothing else.", ""),
        ("conclusion .", f"Use the picture and the scene graph to answer the question. {ANSWER}", "</answer>")],
    "ddcot": [
        ("steps .", "You cannot see the picture that this question is about. Break the question down into "
         "sub-questions, one a line, and answer each behind it. Where the answer needs a look at the picture, write: "
         "uncertain.", ""),
        ("caption .", "The sub-questions above were written without a look at the picture. Look at it, and answer each "
         "one that is marked uncertain.", ""),
        ("conclusion .", "Some of these answers may be wrong. Reason step by step from the picture and all of them, "
         f"then answer the question. {ANSWER}", "</answer>")],
}
VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                 "detailed, and polite answers to the user's questions.")
LLAMA_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that "
                "the user provides, and assist the user with a variety of tasks using natural language.")
# What stands around a question: in front of it, behind it.
FIRST = {"brief": (" ", ""), "vicuna_v1": (f"{VICUNA_SYSTEM} USER: ", " ASSISTANT:"),
         "llama_2": (f"[INST] <<SYS>>\n{LLAMA_SYSTEM}\n<</SYS>>\n\n", " [/INST]"),
         "chatml": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
                    "<|im_end|>\n<|im_start|>assistant\n")}
TEMPLATES = list(FIRST)
TOKENIZER = {"brief": OWN, "vicuna_v1": VICUNA, "llama_2": VICUNA, "chatml": QWEN}


def test_every_method_and_every_template_is_written_out_here():
    assert list(WRITTEN) == list(METHODS) and set(TEMPLATES) == set(chat.TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("method", METHODS)
def test_the_opening_of_a_method_is_the_question_and_what_is_asked_of_its_first_stage(method, template):
    brief, instruction, _ = WRITTEN[method][0]
    words = "What?\n" + instruction
    if template == "brief":
        words = f"What? {brief}".strip()
    front, end = FIRST[template]
    asked = opening(Sample(question="What?"), METHODS[method][0], template)
    assert chat.prompt_text(asked, "direct", template) == front + words + end


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("method", METHODS)
def test_a_later_turn_is_the_end_of_the_reply_and_what_is_asked_of_its_stage(method, template):
    tok = TOKENIZER[template]
    for stage, (brief, instruction, _) in zip(METHODS[method][1:], WRITTEN[method][1:]):
        if template == "brief":
            wanted = [tok.eos_id, *tok.encode(f" {brief}")]
        elif template == "vicuna_v1":
            wanted = [tok.eos_id, *tok.encode(f"USER: {instruction} ASSISTANT:")]
        elif template == "llama_2":
            wanted = [tok.eos_id, tok.bos_id, *tok.encode(f"[INST] {instruction} [/INST]")]
        else:
            start, end = tok.special("<|im_start|>"), tok.special("<|im_end|>")
            wanted = [end, *tok.encode("\n"), start, *tok.encode(f"user\n{instruction}"), end, *tok.encode("\n"), start,
                      *tok.encode("assistant\n")]
        assert next_turn(tok, stage, template) == wanted


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_later_turn_is_what_encode_writes_for_the_conversation_with_the_reply_in_it(template):
    tok = TOKENIZER[template]
    first, second = METHODS["ccot"]
    sample = Sample(images=(PICTURE,), question="What is it?")
    opened = opening(sample, first, template)
    begun, _, _ = chat.encode(opened, tok, PATCHES, "direct", template)
    asked = second.brief if template == "brief" else second.instruction
    whole = Sample(images=(PICTURE,), turns=((opened.question, "It is a dog."),), question=asked)
    ids, _, _ = chat.encode(whole, tok, PATCHES, "direct", template)
    turn = next_turn(tok, second, template)
    assert ids[:len(begun)] == begun and ids[-len(turn):] == turn
    assert tok.decode(ids[len(begun):-len(turn)]).strip() == "It is a dog."


def test_the_last_stage_stops_behind_the_answer_and_no_other_stops_early():
    for method, stages in METHODS.items():
        assert [stage.stop for stage in stages] == [stop for _, _, stop in WRITTEN[method]], method


def test_a_new_conversation_holds_the_earlier_replies_and_the_first_of_ddcot_sees_no_picture():
    sample = Sample(images=(PICTURE,), turns=(("What is <image>?", "A dog."),), question="And <image> this?")
    blind, seeing, _ = METHODS["ddcot"]
    first = opening(sample, blind, "vicuna_v1")
    assert first.images == () and first.turns == (("What is ?", "A dog."),)
    assert first.question == f"And  this?\n{WRITTEN['ddcot'][0][1]}"
    later = opening(sample, seeing, "vicuna_v1", [("steps", "Which breed? uncertain")])
    assert later.images == (PICTURE,) and later.turns == sample.turns
    assert later.question == f"And <image> this?\nsteps: Which breed? uncertain\n{WRITTEN['ddcot'][1][1]}"
    assert opening(sample, seeing, "brief", [("steps", "so")]).question == "And <image> this? so caption ."


@pytest.mark.parametrize("reply, shown", [("an <image> here", "an < image> here"), ("<<image>>", "<< image>>")])
def test_a_reply_that_spells_the_placeholder_shows_no_picture(reply, shown):
    sample = Sample(images=(PICTURE,), question="What?")
    later = opening(sample, METHODS["ddcot"][1], "brief", [("steps", reply)])
    assert later.question == f"What? {shown} caption ."
    ids, _, images = chat.encode(later, OWN, PATCHES, "direct", "brief")
    assert ids.count(OWN.image_id) == PATCHES and len(images) == 1


@pytest.mark.parametrize("method, max_new, wanted", [
    ("direct", 7, [7]), ("stages", 32, [6, 9, 9, 8]), ("stages", 64, [12, 19, 19, 14]), ("stages", 4, [1, 1, 1, 1]),
    ("stages", 5, [1, 1, 1, 2]), ("ccot", 10, [6, 4]), ("ddcot", 3, [1, 1, 1]), ("ddcot", 100, [30, 30, 40]),
    ("caption_first", 9, [4, 5])])
def test_stages_share_the_budget(method, max_new, wanted):
    assert budgets(METHODS[method], max_new) == wanted and sum(wanted) == max_new


def test_no_stage_takes_what_the_later_ones_need():
    greedy = (Stage("a", "", "", share=0.9), Stage("b", "", "", share=0.05), Stage("c", "", "", share=0.05))
    assert budgets(greedy, 4) == [2, 1, 1] and budgets(greedy, 3) == [1, 1, 1]


def test_a_budget_of_fewer_tokens_than_stages_is_one_sentence():
    with pytest.raises(ValueError, match="^max_new=3 must be at least 4, one token for each stage of the prompting$"):
        budgets(METHODS["stages"], 3)
    assert all(sum(stage.share for stage in stages) == pytest.approx(1) for stages in METHODS.values())
