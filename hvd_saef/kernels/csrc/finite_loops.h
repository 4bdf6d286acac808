// Included by each_set.h. True if no element has an exponent of all ones: neither infinite nor NaN.
template <class Word>
LOOP static bool finite_words(const Word* words, int64_t size, Word exponent) {
  constexpr int64_t step = 256 / sizeof(Word), ahead = 4096 / sizeof(Word);
  Word any[step] = {};
  int64_t i = 0;
  for (; i + step <= size; i += step) {
    // The processor's own prefetching ends with each page.
    for (int64_t line = 0; line < step; line += step / 4) __builtin_prefetch(words + i + line + ahead);
    for (int64_t j = 0; j < step; ++j) any[j] |= static_cast<Word>((words[i + j] & exponent) == exponent);
  }
  for (; i < size; ++i) any[0] |= static_cast<Word>((words[i] & exponent) == exponent);
  Word all = 0;
  for (const Word word : any) all |= word;
  return all == 0;
}
