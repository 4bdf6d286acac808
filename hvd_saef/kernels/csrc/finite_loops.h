// Included by each_set.h. True if no element has an exponent of all ones: neither infinite nor NaN.
template <class Word>
LOOP static bool finite_words(const Word* words, int64_t size, Word exponent) {
  Word all = 0;
  for (int64_t i = 0; i < size; ++i) all |= static_cast<Word>((words[i] & exponent) == exponent ? 1 : 0);
  return all == 0;
}
