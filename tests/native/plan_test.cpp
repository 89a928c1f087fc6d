// Properties of the step plan: every element in exactly one item, every group whole and in one tile, or in all strips.
#include <map>

#include "check.h"
#include "specs.h"

namespace {

// The memory offsets of group number `group` of a layout, as groups.h defines it.
std::vector<int64_t> offsets_of_group(const GroupLayout& g, int64_t group) {
  const int64_t g2 = group % g.g2, g1 = group / g.g2 % g.g1, g0 = group / g.g2 / g.g1;
  std::vector<int64_t> offsets;
  for (int64_t r0 = 0; r0 < g.r0; ++r0)
    for (int64_t r1 = 0; r1 < g.r1; ++r1)
      for (int64_t r2 = 0; r2 < g.r2; ++r2)
        offsets.push_back(((((g0 * g.r0 + r0) * g.g1 + g1) * g.r1 + r1) * g.g2 + g2) * g.r2 + r2);
  return offsets;
}

void check_tensor(const PlanView& plan, int tensor, const TensorSpec& spec, const Tuning& tuning) {
  const std::vector<int64_t> oracle = group_of_offset(spec);
  const TensorRecord& record = plan.records()[tensor];
  std::vector<int> seen(oracle.size());
  std::map<int64_t, int> items_of_group;
  CHECK(record.numel == int64_t(oracle.size()) && record.param == spec.param && record.weight == spec.weight);
  for (int64_t i = 0; i < plan.header().items; ++i) {
    const Item& item = plan.items()[i];
    if (item.tensor != tensor) continue;
    CHECK(item.count > 0);
    CHECK((record.strip_rows > 0) == (i >= plan.header().items - plan.header().strips), "strips are last");
    if (record.strip_rows) {
      const GroupLayout& g = record.layout;
      const int64_t columns = g.g2 * g.r2, rows = g.rows();
      CHECK(columns <= tuning.strip_columns && g.g0 * g.g1 == 1 && rows * columns > tuning.strided_tile);
      CHECK(item.begin % record.strip_rows == 0 && item.count == std::min(record.strip_rows, rows - item.begin));
      CHECK(record.strip_rows < rows && record.strip_rows >= tuning.strip_rows);
      CHECK((record.strip_rows - 1) * columns < std::max(tuning.strided_tile, tuning.strip_rows * columns));
      for (int64_t e = item.begin * columns; e < (item.begin + item.count) * columns; ++e) ++seen.at(e);
      for (int64_t e = 0; e < columns; ++e)  // rows are whole, and alike
        CHECK(oracle.at(item.begin * columns + e) == oracle.at(e));
      continue;
    }
    if (spec.group_dims < 0) {
      CHECK(item.begin % 64 == 0 && item.count <= tuning.chunk);
      for (int64_t e = item.begin; e < item.begin + item.count; ++e) ++seen.at(e);
      continue;
    }
    const GroupLayout& g = record.layout;
    CHECK(item.begin / g.g2 == (item.begin + item.count - 1) / g.g2, "a tile crosses (g0, g1)");
    const int64_t elements = item.count * g.group_size(), columns = item.count * g.r2;
    CHECK(item.count <= tuning.max_groups && item.count <= plan.header().tile_groups);
    if (elements <= tuning.capacity)
      CHECK(elements <= plan.header().scratch_elements);
    else
      CHECK(tuning.panel <= plan.header().scratch_elements && (item.count == 1 || columns <= tuning.panel));
    for (uint32_t x : {0u, 1u, uint32_t(columns - 1), uint32_t(columns), uint32_t(5 * columns + 3)}) {
      if (item.count > 1) CHECK(record.by_row.quotient(x) == x / g.r2);
      if (g.rows() == 1) continue;
      CHECK(record.by_inner.quotient(x) == x / g.r1);
      CHECK(record.by_columns[record.by_columns[0].divisor != columns].quotient(x) == x / columns);
    }
    for (int64_t group = item.begin; group < item.begin + item.count; ++group) {
      const std::vector<int64_t> offsets = offsets_of_group(g, group);
      ++items_of_group[oracle.at(offsets[0])];
      for (int64_t offset : offsets) {
        ++seen.at(offset);
        CHECK(oracle.at(offset) == oracle.at(offsets[0]), "a group mixes elements of two");
      }
    }
  }
  for (size_t e = 0; e < seen.size(); ++e) CHECK(seen[e] == 1, "element %zu is in %d items", e, seen[e]);
  for (const auto& [group, count] : items_of_group) CHECK(count == 1, "group %ld is in %d items", long(group), count);
}

// Every tensor belongs to one budget, or to none, and every group that shares one, and every column of a strip, has
// numbers of its own within the plan.
void check_numbers(const PlanView& plan, const std::vector<TensorSpec>& specs) {
  const PlanHeader& header = plan.header();
  int64_t budget = -1, numbers = 0, strips = 0;
  for (size_t t = 0; t < specs.size(); ++t) {
    const TensorRecord& record = plan.records()[t];
    const GroupLayout& g = record.layout;
    CHECK(record.first_number == numbers, "tensor %zu begins at number %ld", t, long(record.first_number));
    if (record.strip_rows) {
      const int64_t count = ceil_div(g.rows(), record.strip_rows);
      strips += count;
      numbers += count * g.g2 * g.r2 * header.group_sums;
    }
    CHECK(plan.group_numbers(record) == plan.numbers(record) + (numbers - record.first_number), "tensor %zu", t);
    const int64_t each = specs[t].budget ? header.group_sums + 1 : record.strip_rows ? header.group_sums : 0;
    numbers += record.numel ? g.groups() * each : 0;
    if (specs[t].budget == 0) continue;
    budget += specs[t].budget > 0;
    const Budget& mine = plan.budgets()[budget];
    CHECK(mine.first_tensor <= int(t) && int(t) < mine.end_tensor, "tensor %zu is not in budget %ld", t, long(budget));
    CHECK(specs[t].budget < 0 || (mine.first_tensor == int(t) && mine.k == specs[t].budget));
  }
  CHECK(header.budgets == budget + 1, "%ld budgets instead of %ld", long(header.budgets), long(budget + 1));
  CHECK(header.strips == strips, "%ld strips instead of %ld", long(header.strips), long(strips));
  const int64_t room = budget < 0 && numbers == 0 ? 0 : 2 * header.tensors + numbers;
  CHECK(header.written_offset % 8 == 0 && header.written_offset + 8 * room == header.bytes, "room for %ld", long(room));
}

void check_random_plans() {
  for (int round = 0; round < 3000; ++round) {
    const bool grouped = round % 2;
    const Tuning tuning = random_tuning();
    std::vector<TensorSpec> specs(g_random() % 5);
    for (TensorSpec& spec : specs) spec = random_spec(grouped);
    if (round % 4 == 1)
      for (TensorSpec& spec : specs) spec.budget = &spec == specs.data() || g_random() % 2 ? pick({1, 2, 7}) : -1;
    const int sums = pick({1, 2});
    const std::vector<char> memory = make_plan(specs, 2, DType::bf16, 2, tuning, sums);
    const std::vector<char> copy = memory;  // as an upload does
    const PlanView plan{copy.data()};
    const PlanHeader& header = plan.header();
    CHECK(header.bytes == int64_t(copy.size()) && header.tensors == int64_t(specs.size()));
    CHECK(header.rule == 2 && header.dtype == int32_t(DType::bf16) && header.slots == 2 && header.group_sums == sums);
    int64_t elements = 0;
    for (size_t t = 0; t < specs.size(); ++t) {
      check_tensor(plan, int(t), specs[t], tuning);
      elements += product(specs[t].sizes);
      const int64_t* shape = plan.shape(int64_t(t));
      const size_t ndim = specs[t].sizes.size();
      CHECK(shape[0] == int64_t(ndim));
      CHECK(std::equal(specs[t].sizes.begin(), specs[t].sizes.end(), shape + 1));
      CHECK(std::equal(specs[t].strides.begin(), specs[t].strides.end(), shape + 1 + ndim));
    }
    CHECK(header.elements == elements);
    check_numbers(plan, specs);
  }
}

void check_dividers() {
  constexpr uint32_t end = 1u << 31;
  for (int round = 0; round < 200000; ++round) {
    const uint32_t divisor = 1 + uint32_t(g_random()) % (round % 2 ? 100 : end - 1), x = uint32_t(g_random()) % end;
    const Divider by = Divider::by(divisor);
    for (uint32_t n : {x, x - x % divisor, x - x % divisor + divisor - 1, end - 1, divisor - 1})
      if (n < end) CHECK(by.quotient(n) == n / divisor, "%u / %u", n, divisor);
  }
}

Tuning tuning_of(int64_t chunk, int64_t tile, int64_t capacity) {
  Tuning tuning{};
  tuning.chunk = chunk;
  tuning.tile = tuning.strided_tile = tile;
  tuning.min_segment = tuning.least_segment = 32;
  tuning.max_groups = 1024;
  tuning.align = 8;
  tuning.capacity = tuning.panel = capacity;
  tuning.workers = 1;
  return tuning;
}

// More than 2^31 elements: the items follow each other without gap or overlap up to the end.
void check_large(const Dims& sizes, int64_t group_dims, int64_t expected_units) {
  const Tuning tuning = tuning_of(1 << 16, 1 << 14, 1 << 20);
  const TensorSpec large = spec_of(sizes, dense_strides(sizes, in_order(sizes.size())), group_dims);
  const TensorSpec empty = spec_of({0, 3}, {3, 1}, group_dims);
  const std::vector<char> memory = make_plan({empty, large, empty}, 0, DType::f32, 1, tuning);
  const PlanView plan{memory.data()};
  int64_t next = 0;
  for (int64_t i = 0; i < plan.header().items; ++i) {
    const Item& item = plan.items()[i];
    CHECK(item.tensor == 1 && item.begin == next && item.count > 0, "item %ld", long(i));
    next = item.begin + item.count;
  }
  CHECK(next == expected_units, "%ld units instead of %ld", long(next), long(expected_units));
  CHECK(plan.header().elements == product(sizes) && product(sizes) > int64_t(1) << 31);
}

template <class F> bool refuses(F make) {
  try {
    make();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void check_refusals() {
  const Tuning tuning = tuning_of(64, 64, 512);
  const auto plan = [&](std::vector<TensorSpec> specs) { return make_plan(specs, 0, DType::f32, 1, tuning); };
  CHECK(refuses([&] { plan({spec_of({4, 3}, {0, 1}, -1)}); }), "an expanded view");
  CHECK(refuses([&] { plan({spec_of({4, 3}, {6, 2}, -1)}); }), "every second column");
  CHECK(refuses([&] { plan({spec_of({4, 3}, {1, 1}, -1)}); }), "overlapping rows");
  CHECK(refuses([&] { plan({spec_of({4}, {1}, -1), spec_of({4}, {1}, 1)}); }), "separable and grouped in one plan");
  const Dims seven(7, 2);
  CHECK(refuses([&] { plan({spec_of(seven, dense_strides(seven, in_order(7)), 0b0101010)}); }), "seven runs");
  CHECK(!refuses([&] { plan({spec_of({4, 1, 3}, {3, 77, 1}, 1)}); }), "the stride of a size-1 dim is free");
  CHECK(!refuses([&] { plan({}); }), "no tensors");
  TensorSpec first = spec_of({4}, {1}, 1), second = first;
  second.budget = 3;
  CHECK(refuses([&] { plan({first, second}); }), "a budget for some");
  CHECK(refuses([&] { plan({second, first}); }), "a budget for some");
  first.budget = -1;
  CHECK(!refuses([&] { plan({second, first}); }), "a budget for two");
  CHECK(refuses([&] { plan({first, second}); }), "shares the budget of none");
  second.group_dims = -1;
  CHECK(refuses([&] { plan({second}); }), "a budget without groups");
}

}  // namespace

int main() {
  check_dividers();
  check_random_plans();
  check_large({3, (int64_t(1) << 30) + 5}, -1, 3 * ((int64_t(1) << 30) + 5));
  check_large({(1 << 20) + 1, 4099}, 0b01, (1 << 20) + 1);            // rows
  check_large({4099, (1 << 20) + 1}, 0b10, (1 << 20) + 1);            // columns
  check_large({70001, 513, 7, 9}, 0b11, int64_t(70001) * 513);        // kernels
  check_large({70001, 513, 7, 9}, 0b10, 513);                         // input channels
  check_large({40000, 3, 53700}, 0b101, int64_t(40000) * 53700);      // more than 2^31 groups
  check_refusals();
  return report();
}
