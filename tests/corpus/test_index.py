import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rbm.corpus.index import CSR, Ids, Names
from rbm.corpus.tables import pack_strings


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), max_size=60))
def test_csr_holds_every_row_once_in_its_group(rows):
    task = np.array([row[0] for row in rows], np.int32)
    quality = np.array([row[1] for row in rows], np.int8)
    csr = CSR.build(task, quality, n_tasks=7)
    assert csr.indptr.shape == (22,)
    for t in range(7):
        for q in range(3):
            group = csr.rows(t, q)
            np.testing.assert_array_equal(group, np.flatnonzero((task == t) & (quality == q)))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=30))
def test_ids_are_found_by_their_text(texts):
    heap, end = pack_strings(texts)
    ids = Ids(heap, end, Names.build(heap, end))
    assert list(ids) == texts
    assert [ids[row] for row in range(len(ids))] == texts
    assert [ids.find(text) for text in texts] == list(range(len(texts)))
    assert ids[1:3] == texts[1:3]
    assert ids.find("\x00 surely not there") is None
    assert ids.find("\udcff") is None
